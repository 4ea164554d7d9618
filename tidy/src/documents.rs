//! Documents: their links and the width of their lines.

use std::path::{Component, Path, PathBuf};

use crate::items::Finding;

/// Links of a Markdown file that lead nowhere: to a file that is not there, or to a heading that a file does not have.
/// Links to the web are not followed, and are counted by [`web_links`].
pub fn dead_links(root: &Path, path: &Path, text: &str) -> Vec<Finding> {
    let mut dead = Vec::new();
    for (line, link) in links(text) {
        if is_web(&link) {
            continue;
        }
        let (file, heading) = link.split_once('#').map_or((&*link, None), |(f, h)| (f, Some(h)));
        let target = match file {
            "" => path.to_owned(),
            file => flat(&path.parent().unwrap_or(Path::new("")).join(file)),
        };
        let at = format!("{}:{line}", path.display());
        if !root.join(&target).exists() {
            dead.push((at, format!("there is no {}", target.display())));
        } else if let Some(heading) = heading {
            let text = std::fs::read_to_string(root.join(&target)).unwrap_or_default();
            if !headings(&text).any(|h| h == heading) {
                dead.push((at, format!("{} has no heading #{heading}", target.display())));
            }
        }
    }
    dead
}

/// How many links lead to the web.
pub fn web_links(text: &str) -> usize {
    links(text).iter().filter(|(_, link)| is_web(link)).count()
}

fn is_web(link: &str) -> bool {
    link.starts_with("http://") || link.starts_with("https://") || link.starts_with("mailto:")
}

/// The targets of `[text](target)`, `![text](target)` and `src="target"` outside code, with their lines.
fn links(text: &str) -> Vec<(usize, String)> {
    let mut links = Vec::new();
    for (n, line) in outside_code(text) {
        for (start, end) in [("](", ')'), ("src=\"", '"'), ("href=\"", '"')] {
            for rest in line.split(start).skip(1) {
                if let Some((link, _)) = rest.split_once(end) {
                    links.push((n, link.split(' ').next().unwrap_or_default().to_owned()));
                }
            }
        }
    }
    links
}

/// Headings as the anchors that repository hosts make of them.
fn headings(text: &str) -> impl Iterator<Item = String> {
    outside_code(text).into_iter().filter(|(_, line)| line.starts_with('#')).map(|(_, line)| {
        let kept = line.trim_start_matches('#').trim().to_lowercase();
        let kept = kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    })
}

/// Lines that are not in a code block, without their code spans, numbered from 1.
fn outside_code(text: &str) -> Vec<(usize, String)> {
    let mut lines = Vec::new();
    let mut in_code = false;
    for (n, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        } else if !in_code {
            lines.push((n + 1, line.split('`').step_by(2).collect()));
        }
    }
    lines
}

/// Lines wider than `columns`, but for tables, code blocks and lines whose only word is long (addresses).
pub fn wide_lines(path: &Path, text: &str, columns: usize) -> Vec<Finding> {
    let wide = |line: &str| {
        line.chars().count() > columns && !line.starts_with('|') && line.split_whitespace().count() > 1
    };
    let lines = text.lines().enumerate().filter(|(_, line)| wide(line));
    lines
        .map(|(n, line)| {
            (format!("{}:{}", path.display(), n + 1), format!("{} columns", line.chars().count()))
        })
        .collect()
}

/// A path without `..`.
fn flat(path: &Path) -> PathBuf {
    let mut flat = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => drop(flat.pop()),
            Component::CurDir => {}
            other => flat.push(other),
        }
    }
    flat
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_and_anchors_are_found_outside_code() {
        let text =
            "# A: the `x`\n[a](b.md#c) `[no](no)`\n```\n[no](no)\n```\n<img src=\"p.svg\">\n[w](https://w)";
        let found = links(text);
        assert_eq!(found, [(2, "b.md#c".into()), (6, "p.svg".into()), (7, "https://w".into())]);
        assert_eq!(web_links(text), 1);
        assert_eq!(headings("# Two words, one\n").collect::<Vec<_>>(), ["two-words-one"]);
        assert_eq!(flat(Path::new("docs/../README.md")), Path::new("README.md"));
    }
}
