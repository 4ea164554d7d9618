//! Documents: their links and the width of their lines.

use std::path::{Component, Path, PathBuf};

use crate::Finding;

/// Links of a Markdown file that lead nowhere: to none of the checkout's `files` and their folders, or to a heading that
/// a file does not have. Links to the web are not followed, and are counted by [`web_links`].
pub fn dead_links(root: &Path, files: &[PathBuf], path: &Path, text: &str) -> Vec<Finding> {
    let mut dead = Vec::new();
    for (line, link) in links(text) {
        if is_web(&link) {
            continue;
        }
        let (file, heading) = link.split_once('#').map_or((&*link, None), |(f, h)| (f, Some(h)));
        let target = match file {
            "" => Some(path.to_owned()),
            file => flat(&path.parent().unwrap_or(Path::new("")).join(file)),
        };
        let at = format!("{}:{line}", path.display());
        let Some(target) = target.filter(|target| files.iter().any(|f| f.starts_with(target))) else {
            dead.push((at, format!("the checkout has no {file}")));
            continue;
        };
        if let Some(heading) = heading {
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

/// The targets of links outside code, with their lines: `[text](target)`, `![text](target)`, `[label]: target`,
/// `src="target"` and `href="target"`. The target of `[text][label]` is `[label]` if the label has none.
fn links(text: &str) -> Vec<(usize, String)> {
    let lines = outside_code(text);
    let label = |line: &str| Some(line.strip_prefix('[')?.split_once("]: ")?.0.to_lowercase());
    let labels: Vec<_> = lines.iter().filter_map(|(_, line)| label(line)).collect();
    let mut links = Vec::new();
    for (n, line) in &lines {
        let definition = label(line).and_then(|_| line.split_once("]: "));
        let mut add = |link: &str| links.push((*n, link.split(' ').next().unwrap_or_default().to_owned()));
        definition.into_iter().for_each(|(_, target)| add(target));
        for (start, end) in
            [("](", ')'), ("src=\"", '"'), ("href=\"", '"'), ("src='", '\''), ("href='", '\'')]
        {
            line.split(start).skip(1).filter_map(|rest| rest.split_once(end)).for_each(|(link, _)| add(link));
        }
        let used = line.split("][").skip(1).filter_map(|rest| Some(rest.split_once(']')?.0));
        let unknown = used.filter(|label| !labels.contains(&label.to_lowercase()));
        unknown.for_each(|label| add(&format!("[{}]", label.replace(' ', "-"))));
    }
    links
}

/// Headings as the anchors that repository hosts make of them.
fn headings(text: &str) -> impl Iterator<Item = String> {
    outside_blocks(text).into_iter().filter(|(_, line)| line.starts_with('#')).map(|(_, line)| {
        let kept = line.trim_start_matches('#').trim().to_lowercase();
        let kept = kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    })
}

/// Lines that are not in a code block, numbered from 1.
fn outside_blocks(text: &str) -> Vec<(usize, &str)> {
    let mut lines = Vec::new();
    let mut fence = None;
    for (n, line) in text.lines().enumerate() {
        let start = ["```", "~~~"].into_iter().find(|start| line.trim_start().starts_with(start));
        match (fence, start) {
            (None, None) => lines.push((n + 1, line)),
            (None, start) => fence = start,
            (fence_now, start) if fence_now == start => fence = None,
            _ => {}
        }
    }
    lines
}

/// Lines outside code blocks, without code spans, which may go over several lines of a paragraph.
fn outside_code(text: &str) -> Vec<(usize, String)> {
    let mut lines = Vec::new();
    let mut in_span = false;
    for (n, line) in outside_blocks(text) {
        in_span &= !line.trim().is_empty();
        let skipped = usize::from(in_span);
        lines.push((n, line.split('`').skip(skipped).step_by(2).collect()));
        in_span ^= line.matches('`').count() % 2 == 1;
    }
    lines
}

/// Lines wider than `columns`, except in tables, and those of one word (addresses).
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

/// A path without `..`. None if it leads out of the checkout.
fn flat(path: &Path) -> Option<PathBuf> {
    let mut flat = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir if !flat.pop() => return None,
            Component::ParentDir | Component::CurDir => {}
            other => flat.push(other),
        }
    }
    Some(flat)
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
        assert_eq!(flat(Path::new("docs/../README.md")), Some("README.md".into()));
        assert_eq!(flat(Path::new("docs/../../README.md")), None);
    }

    #[test]
    fn dead_links_are_found_in_every_form() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let files = ["src/lib.rs", "README.md"].map(PathBuf::from);
        let dead = |text: &str| dead_links(root, &files, Path::new("a/b.md"), text).len();
        for link in ["../README.md", "../src", "../src/lib.rs", "https://w/no"] {
            assert_eq!(dead(&format!("[a]({link} \"title\") [x][y]\n\n[y]: {link}")), 0, "{link}");
        }
        for link in ["../readme.md", "no.md", "../../README.md", "../tests/tidy.rs", "../README.md#no"] {
            assert_eq!(dead(&format!("[a]({link})\n<a href='{link}'>\n[x][y]\n\n[y]: {link}")), 3, "{link}");
        }
        assert_eq!(dead("[x][unknown]"), 1);
        assert_eq!(dead("`a\nb` [a](no.md)"), 1);
        assert_eq!(dead("```\n~~~\n```\n[a](no.md)"), 1);
        assert_eq!(headings("# A: the `x`\n").collect::<Vec<_>>(), ["a-the-x"]);
    }

    #[test]
    fn lines_are_wide_except_in_tables() {
        let wide = |text: &str| wide_lines(Path::new("x"), text, 9).len();
        assert_eq!(
            [wide("ab cd efgh"), wide("ab cd éfg"), wide("| ab cd ef |"), wide("http://abc")],
            [1, 0, 0, 0]
        );
    }
}
