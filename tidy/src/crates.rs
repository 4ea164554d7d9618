//! Manifests: which crate depends on which, and features that no program may have.

use std::path::Path;

use crate::Finding;

/// A crate that another one depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dependency {
    /// Its package's name.
    pub name: String,
    /// The section of the manifest, in which `dev-dependencies` are for tests only.
    pub section: String,
    /// The line.
    pub line: usize,
}

impl Dependency {
    /// Whether only tests have it.
    pub fn is_for_tests(&self) -> bool {
        self.section.ends_with("dev-dependencies")
    }
}

/// The lines of a manifest that are not comments, each with its section and number.
fn lines(text: &str) -> impl Iterator<Item = (String, &str, usize)> {
    let mut section = String::new();
    text.lines().enumerate().filter_map(move |(n, line)| {
        let line = line.trim();
        if let Some(name) = line.strip_prefix('[') {
            section = name.trim_end_matches(']').to_owned();
        }
        (!line.is_empty() && !line.starts_with('#')).then(|| (section.clone(), line, n + 1))
    })
}

/// The value of `key = "value"` in a line.
pub fn value<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let rest = line.split_once(key)?.1.trim_start().strip_prefix('=')?.trim_start().strip_prefix('"')?;
    rest.split('"').next()
}

/// The dependencies of a manifest, in all of its sections.
pub fn dependencies(text: &str) -> Vec<Dependency> {
    let mut all = Vec::<Dependency>::new();
    for (section, line, number) in lines(text) {
        let of = |name: &str, section: &str| Dependency {
            name: name.to_owned(),
            section: section.to_owned(),
            line: number,
        };
        if let Some((before, name)) = section.rsplit_once('.').filter(|(s, _)| s.ends_with("dependencies")) {
            if line.starts_with('[') {
                all.push(of(name, before));
            } else if let (Some(name), Some(last)) = (value(line, "package"), all.last_mut()) {
                last.name = name.to_owned();
            }
        } else if section.ends_with("dependencies") && !line.starts_with('[') {
            let key = line.split(['.', '=']).next().unwrap_or_default().trim();
            all.push(of(value(line, "package").unwrap_or(key), &section));
        }
    }
    all
}

/// The name of a manifest's package, if it has one.
pub fn name(text: &str) -> Option<&str> {
    lines(text)
        .find(|(section, line, _)| section == "package" && line.starts_with("name"))
        .and_then(|(_, line, _)| value(line, "name"))
}

/// Where a manifest gives a feature to a program: everywhere but in its definition and in dependencies of tests.
pub fn gives_feature(path: &Path, text: &str, feature: &str) -> Vec<Finding> {
    let mut found = Vec::new();
    for (section, line, number) in lines(text) {
        let defines =
            section == "features" && line.split('=').next().is_some_and(|key| key.trim() == feature);
        if line.contains(feature) && !defines && !section.contains("dev-dependencies") {
            found.push((format!("{}:{number}", path.display()), format!("[{section}] {line}")));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_found_in_every_form() {
        let text = "[package]\nname = \"p\"\n[dependencies]\n# no\na = \"1\"\nb.workspace = true\nx = { package = \"c\" }\n\
                    [dependencies.d]\nversion = \"1\"\n[build-dependencies.y]\npackage = \"e\"\n\
                    [target.'cfg(unix)'.dependencies]\nf = { path = \"../f\" }\n[dev-dependencies]\ng = \"1\"\n[lints]\nh = true";
        assert_eq!(name(text), Some("p"));
        let (tests, all): (Vec<_>, Vec<_>) =
            dependencies(text).into_iter().partition(Dependency::is_for_tests);
        let names = |all: Vec<Dependency>| all.into_iter().map(|d| d.name).collect::<Vec<_>>().concat();
        assert_eq!((names(all), names(tests)), ("abcdef".into(), "g".into()));
    }

    #[test]
    fn a_feature_is_given_by_dependencies_and_by_other_features() {
        let given = |text: &str| gives_feature(Path::new("x"), text, "risky").len();
        assert_eq!(
            given(
                "[features]\n# risky\nrisky = [\"y/risky\"]\n[dev-dependencies]\ny = { features = [\"risky\"] }"
            ),
            0
        );
        assert_eq!(given("[dependencies]\ny = { features = [\"risky\"] }"), 1);
        assert_eq!(given("[dependencies.y]\nfeatures = [\"risky\"]"), 1);
        assert_eq!(given("[features]\ndefault = [\"risky\"]"), 1);
    }
}
