use super::*;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestMemoryBackend};

#[test]
fn device_writes_are_listed_once_and_hashed() {
    let mut ram = Ram::new(16 * PAGE as u64).unwrap();
    assert_eq!(ram.digest(), Digest(0), "zeros have digest 0");
    ram.memory().write_slice(&[1, 2, 3], GuestAddress(2 * PAGE as u64 - 1)).unwrap();
    ram.memory().write_slice(&[4], GuestAddress(PAGE as u64)).unwrap();
    let digest = ram.digest();
    let mut pages = Vec::new();
    ram.take_changed(|page| pages.push(page));
    assert_eq!(pages, [1, 2]);
    assert_ne!(digest, Digest(0));
    assert_eq!(ram.digest(), digest);
    assert_eq!(ram.full_digest(), digest);
}

#[test]
fn a_loaded_file_counts_where_it_was_changed_only() {
    let file = Arc::new(vec![7; 2 * PAGE + 100]);
    let mut ram = Ram::new(8 * PAGE as u64).unwrap();
    ram.load(3, file.clone());
    let rest = ram.digest();
    assert_eq!((rest, ram.page(4)[9], ram.page(5)[99], ram.page(5)[100]), (ram.full_digest(), 7, 7, 0));
    assert_eq!((ram.page_digest(3), ram.page_digest(4)), (Digest(0), Digest(0)));
    assert_ne!(rest, Digest(0), "the last page is not full");
    assert!(ram.scrub(8).is_ok());

    ram.page(4)[9] = 8;
    assert!(matches!(ram.scrub(8), Err(RamError::Changed { page: 4 })), "this write was not reported");
    ram.note_written(4);
    let changed = ram.digest();
    assert_ne!(changed, rest);
    ram.page(4).fill(0);
    ram.note_written(4);
    let zeros = ram.digest();
    assert_eq!(zeros, ram.full_digest());
    assert!(![rest, changed].contains(&zeros), "zeros differ from the loaded file");

    ram.clear().unwrap();
    assert_eq!(ram.digest(), ram.full_digest());
    ram.load(3, file);
    ram.note_written(3);
    ram.note_written(4);
    assert_eq!(ram.digest(), rest, "the same content is loaded again");
}

#[test]
fn ram_above_the_hole_continues_the_slice() {
    let mut ram = Ram::new(HOLE_START + 4 * PAGE as u64).unwrap();
    assert!(ram.memory().find_region(GuestAddress(HOLE_START)).is_none());
    ram.memory().write_slice(b"high", GuestAddress(HOLE_END + PAGE as u64)).unwrap();
    let at = HOLE_START as usize + PAGE;
    assert_eq!(&ram.as_mut_slice()[at..at + 4], b"high");
    let mut pages = Vec::new();
    ram.take_changed(|page| pages.push(page));
    assert_eq!(pages, [(at / PAGE) as u32]);
}

#[test]
fn a_scrub_finds_what_nobody_reported() {
    let mut ram = Ram::new(8 * PAGE as u64).unwrap();
    ram.digest();
    ram.as_mut_slice()[5 * PAGE] = 1;
    let found: Vec<bool> = (0..4).map(|_| ram.scrub(2).is_err()).collect();
    assert_eq!(found, [false, false, true, false], "the pages are checked in turn");
    assert!(matches!(ram.scrub(100), Err(RamError::Changed { page: 5 })));
    ram.note_written(5);
    ram.digest();
    assert!(ram.scrub(100).is_ok());
}

#[test]
fn clearing_makes_zeros() {
    let mut ram = Ram::new(8 * PAGE as u64).unwrap();
    ram.memory().write_slice(b"x", GuestAddress(3)).unwrap();
    ram.digest();
    ram.clear().unwrap();
    assert_eq!((ram.digest(), ram.full_digest(), ram.page(0)[3]), (Digest(0), Digest(0), 0));
}

#[test]
fn odd_sizes_are_refused() {
    assert!(matches!(Ram::new(0), Err(RamError::Size(0))));
    assert!(matches!(Ram::new(4097), Err(RamError::Size(4097))));
}

proptest! {
    #[test]
    fn incremental_digest_equals_full(
        writes in prop::collection::vec((any::<bool>(), 0u64..32 * PAGE as u64 - 8, any::<u64>()), 1..60),
    ) {
        let mut ram = Ram::new(32 * PAGE as u64).unwrap();
        for (i, (by_device, at, value)) in writes.into_iter().enumerate() {
            // Small values make zero pages again from time to time.
            let value = if value % 3 == 0 { 0 } else { value };
            if by_device {
                ram.memory().write_obj(value, GuestAddress(at)).unwrap();
            } else {
                ram.as_mut_slice()[at as usize..at as usize + 8].copy_from_slice(&value.to_le_bytes());
                ram.note_written((at / PAGE as u64) as u32);
                ram.note_written(((at + 7) / PAGE as u64) as u32);
            }
            if i % 7 == 0 {
                prop_assert_eq!(ram.digest(), ram.full_digest());
            }
            if i % 11 == 0 {
                ram.take_changed(|_| ());
            }
        }
        prop_assert_eq!(ram.digest(), ram.full_digest());
    }
}
