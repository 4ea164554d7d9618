//! An error in one line.

/// The messages of an error and all its sources, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |e| e.source());
    causes.map(|e| e.to_string()).collect::<Vec<_>>().join(": ")
}
