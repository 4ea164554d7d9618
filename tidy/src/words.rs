//! Words that must not be used: ARCHITECTURE.md's glossary ends with a table of them, with the words to use instead.

use std::path::Path;

use crate::Finding;

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
        let [words, instead] = cells[..] else {
            panic!("a row of the never list must have two cells: {row}")
        };
        let word = |w: &str| w.trim().trim_matches(|c| "`\"“”".contains(c)).to_lowercase();
        list.extend(words.split(',').map(|w| Never { word: word(w), instead: instead.to_owned() }));
    }
    assert!(list.iter().all(|never| !never.word.is_empty()), "the never list has an empty word");
    list
}

/// Uses of the list's words in a text: as whole words or their plurals, as parts of a name (`SpacingRule`,
/// `narrow_down`), and as phrases that go on in the next line.
pub fn uses(path: &Path, text: &str, list: &[Never]) -> Vec<Finding> {
    let numbered = text.lines().enumerate();
    let words: Vec<_> =
        numbered.flat_map(|(n, line)| split_names(line).map(move |word| (word, n + 1))).collect();
    let mut found = Vec::new();
    for never in list {
        let phrase: Vec<_> = never.word.split(' ').collect();
        let is_word = |(said, word): (&(String, usize), &&str)| {
            said.0 == *word || said.0.strip_suffix('s') == Some(*word)
        };
        for said in words.windows(phrase.len()).filter(|said| said.iter().zip(&phrase).all(is_word)) {
            let at = format!("{}:{}", path.display(), said[0].1);
            found.push((at, format!("\"{}\": say {}", never.word, never.instead)));
        }
    }
    found
}

/// The line's words in lower case; names are taken apart.
fn split_names(line: &str) -> impl Iterator<Item = String> {
    let mut words = vec![String::new()];
    let mut last = ' ';
    let mut rest = line.chars().peekable();
    while let Some(c) = rest.next() {
        // `OutputSpacing`, and `TLSSpacing`.
        let is_inner =
            c.is_uppercase() && last.is_uppercase() && rest.peek().is_some_and(|next| next.is_lowercase());
        if !c.is_alphanumeric() || c.is_uppercase() && last.is_lowercase() || is_inner {
            words.push(String::new());
        }
        if c.is_alphanumeric() {
            words.last_mut().expect("one").extend(c.to_lowercase());
        }
        last = c;
    }
    words.into_iter().filter(|word| !word.is_empty())
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
        assert_eq!([uses("'spacing'"), uses("its spacing's"), uses("spacings")], [1, 1, 1]);
        assert_eq!([uses("TLSSpacing"), uses("SPACING_MS"), uses("TLSspacing")], [1, 1, 0]);
        assert_eq!([uses("// so\n// many"), uses("/// So\n\n/// few")], [1, 0]);
    }
}
