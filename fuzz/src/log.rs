//! The log's decoder.

use entry::Position;
use entry::PositionUnit;
use entry::block::{Decoder, Encoder};
use entry::codec::{ByteReader, encode};
use entry::identity::Identity;

const UNITS: [PositionUnit; 4] =
    [PositionUnit::Instructions, PositionUnit::SynchronousExits, PositionUnit::Branches, PositionUnit::Steps];

/// Decodes any bytes, cut into any pieces: the records or the error do not depend on the cuts, and what decodes encodes
/// back to the same bytes.
///
/// # Panics
/// The decoder misbehaves.
pub fn log(data: &[u8]) {
    let Some((&choice, bytes)) = data.split_first() else { return };
    if choice & 0x80 != 0 {
        whole_log(bytes, choice as usize & 0x7f);
    } else {
        entries(bytes, UNITS[choice as usize % 4]);
    }
}

/// Decodes a whole log, header and checksums included.
fn whole_log(bytes: &[u8], piece: usize) {
    let decode = |piece: usize| {
        let mut d = Decoder::new();
        let mut records = Vec::new();
        for piece in bytes.chunks(piece.max(1)) {
            d.push(piece);
            while let Some(block) = d.next_block()? {
                records.extend(block);
            }
        }
        Ok::<_, entry::codec::DecodeError>((records, d.incomplete()))
    };
    assert_eq!(decode(piece), decode(bytes.len()));
}

/// Decodes the entries of a block without its checksums, which would keep a fuzzer out.
fn entries(bytes: &[u8], unit: PositionUnit) {
    let (mut read, mut written) = (Position::default(), Position::default());
    let mut reader = ByteReader::new(bytes, 0);
    let mut out = Vec::new();
    let mut records = Vec::new();
    while !reader.is_done() {
        let Ok(record) = reader.record(unit, &mut read) else { break };
        encode(unit, &mut written, &record, &mut out);
        records.push(record);
    }
    assert!(bytes.starts_with(&out), "what was decoded encodes to other bytes");
    let mut encoder = Encoder::new(&Identity::new(unit));
    records.iter().for_each(|r| encoder.append(r));
    encoder.close_block();
    let mut decoder = Decoder::new();
    decoder.push(&encoder.take_bytes());
    let mut again = Vec::new();
    while let Some(block) = decoder.next_block().expect("our own log is refused") {
        again.extend(block);
    }
    assert_eq!(records, again);
}
