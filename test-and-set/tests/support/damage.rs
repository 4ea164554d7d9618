//! A member whose files are damaged while it is down.

use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use rand::RngExt;
use rand::rngs::StdRng;

/// Flips one bit of a random byte of a file that is not zero, or empties its page.
pub fn damage(file: &Path, random: &mut StdRng) -> std::io::Result<()> {
    let mut opened = std::fs::File::options().read(true).write(true).open(file)?;
    let mut bytes = vec![];
    opened.read_to_end(&mut bytes)?;
    let filled: Vec<_> = (0..bytes.len()).filter(|at| bytes[*at] != 0).collect();
    let Some(at) = (!filled.is_empty()).then(|| filled[random.random_range(0..filled.len())]) else {
        return Ok(());
    };
    let page = at / 4096 * 4096;
    let damaged = match random.random_bool(0.5) {
        true => (at, vec![bytes[at] ^ 1 << random.random_range(0..8)]),
        false => (page, vec![0; 4096.min(bytes.len() - page)]),
    };
    opened.seek(SeekFrom::Start(damaged.0 as u64))?;
    opened.write_all(&damaged.1)?;
    opened.sync_all()
}
