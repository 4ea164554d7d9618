//! Words that are not used: ARCHITECTURE.md's glossary ends with a table of them and of what to say instead.

use std::path::Path;

use crate::items::Finding;

/// A word or phrase of the "never" list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Never {
    /// What is not said, in lower case.
    pub word: String,
    /// What is said instead.
    pub instead: String,
}

/// The list, from the text of ARCHITECTURE.md: the rows of the table below the heading "Never", whose cells hold the
/// words in quotes or back-quotes, divided by commas.
pub fn never_list(architecture: &str) -> Vec<Never> {
    let mut lines =
        architecture.lines().skip_while(|line| !line.starts_with('#') || !line.ends_with("Never"));
    lines.next();
    let rows = lines.take_while(|line| !line.starts_with('#')).filter(|line| line.starts_with('|'));
    let mut list = Vec::new();
    for row in rows.skip(2) {
        let cells: Vec<_> = row.trim_matches('|').split('|').map(str::trim).collect();
        if let [words, instead] = cells[..] {
            let word = |w: &str| w.trim().trim_matches(|c| "`\"“”".contains(c)).to_lowercase();
            list.extend(words.split(',').map(|w| Never { word: word(w), instead: instead.to_owned() }));
        }
    }
    list
}

/// Uses of the list's words in a text: as whole words, or as parts of a name (`SpacingRule`, `narrow_down`).
pub fn uses(path: &Path, text: &str, list: &[Never]) -> Vec<Finding> {
    let mut found = Vec::new();
    for (n, line) in text.lines().enumerate() {
        let split = split_names(line);
        for never in list {
            if split.contains(&format!(" {} ", never.word)) {
                let at = format!("{}:{}", path.display(), n + 1);
                found.push((at, format!("\"{}\": say {}", never.word, never.instead)));
            }
        }
    }
    found
}

/// The line's words in lower case, a space around each; names are taken apart.
fn split_names(line: &str) -> String {
    let mut split = String::from(" ");
    let mut last = ' ';
    for c in line.chars() {
        let divides = c.is_uppercase() && last.is_lowercase() || !c.is_alphanumeric() && c != '\'';
        if divides && !split.ends_with(' ') {
            split.push(' ');
        }
        if c.is_alphanumeric() || c == '\'' {
            split.extend(c.to_lowercase());
        }
        last = c;
    }
    split.push(' ');
    split
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_found_in_sentences_and_in_names() {
        let text = "# Glossary\n## Never\n\n| not | but |\n|---|---|\n| `spacing`, \"so many\" | coalescing |\n## More\n";
        let list = never_list(text);
        assert_eq!(list.len(), 2);
        let uses = |line| uses(Path::new("x"), line, &list).len();
        assert_eq!(
            [uses("struct OutputSpacing;"), uses("fn spacing_rule() {}"), uses("So many bytes")],
            [1, 1, 1]
        );
        assert_eq!([uses("struct Spaced;"), uses("so, many bytes"), uses("a number")], [0, 1, 0]);
    }
}
