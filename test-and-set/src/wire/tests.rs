//! The bytes of the protocol, and what is refused.

use proptest::prelude::*;

use super::*;

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

fn greeting(body: &impl Serialize) -> Vec<u8> {
    let mut bytes = vec![];
    block_on(write_greeting(&mut bytes, body)).unwrap();
    bytes
}

fn read_hello(bytes: &[u8]) -> Result<(u16, StoreHello), WireError> {
    block_on(read_greeting(&mut &bytes[..]))
}

#[test]
fn a_frame_reads_back() {
    for version in OURS.oldest..=OURS.newest {
        let bytes = frame(version, 7, &StoreRequest::Get("vm".parse().unwrap())).unwrap();
        let mut from = &bytes[..];
        let (number, body) = block_on(async {
            let length = read_length(&mut from, CLIENT_FRAME_BYTES_MAX).await.unwrap().unwrap();
            read_rest(&mut from, length).await.unwrap()
        });
        assert_eq!(number, 7);
        assert!(matches!(decode(version, &body), Ok(StoreRequest::Get(vm)) if vm.as_str() == "vm"));
    }
}

/// The bytes of version 2, as the module's documentation describes them.
#[test]
fn the_bytes_are_those_of_the_page() {
    assert_eq!(frame(2, 0x0102, &StoreRequest::Ping).unwrap(), [9, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 3]);
    let hello = StoreHello { cluster: "c".parse().unwrap(), member: None };
    let newest = OURS.newest as u8;
    assert_eq!(greeting(&hello), [b'V', b'M', b'T', b'S', newest, 0, 2, 0, 3, 0, 1, b'c', 0]);
}

#[test]
fn faults_are_named() {
    let read = |bytes: &[u8]| block_on(read_length(&mut &bytes[..], 64)).map_err(|e| e.to_string());
    assert_eq!(read(&[]), Ok(None));
    for length in [7, 65] {
        assert_eq!(
            read(&[length, 0, 0, 0]).unwrap_err(),
            format!("offset 0: the frame has a length of {length} bytes, but only 8 to 64 are allowed")
        );
    }
    assert!(matches!(read_hello(b"GET / HTTP/1.1"), Err(WireError::Magic(_))));
    assert!(matches!(read_hello(b"VMTS\x02\0\x02\0\x01\x04"), Err(WireError::Greeting(1025))));
    assert!(matches!(decode::<StoreRequest>(2, &[3, 0]), Err(WireError::Tail(1))));
}

#[test]
fn sides_without_a_common_version_are_named() {
    let refusal = |bytes: &[u8]| read_hello(bytes).unwrap_err().to_string();
    let words = |theirs: &str| {
        format!(
            "offset 4: the other side speaks {theirs} of the store's protocol and this one {OURS}, so they have none in \
             common: replace the older of the two releases"
        )
    };
    // Version 1 had its length at offset 6.
    assert_eq!(refusal(b"VMTS\x01\0\x03\0\x01c\0"), words("version 1"));
    assert_eq!(refusal(b"VMTS\x09\0\x08\0\x03\0\x01c\0"), words("versions 8 to 9"));
    assert_eq!(read_hello(b"VMTS\x09\0\x02\0\x03\0\x01c\0").unwrap().0, OURS.newest);
}

/// What a later release may send in place of [`StoreHello`].
#[derive(Serialize, Deserialize)]
struct LongerHello {
    cluster: ClusterName,
    member: Option<MemberHello>,
    wishes: Vec<u64>,
    answer: Option<u64>,
}

#[test]
fn a_greeting_with_more_or_fewer_fields_is_read() {
    let cluster: ClusterName = "c".parse().unwrap();
    let longer = LongerHello { cluster: cluster.clone(), member: None, wishes: vec![1, 2], answer: Some(3) };
    assert_eq!(read_hello(&greeting(&longer)).unwrap().1.cluster, cluster);
    let hello = greeting(&StoreHello { cluster: cluster.clone(), member: None });
    let (_, read) = block_on(read_greeting::<LongerHello>(&mut &hello[..])).unwrap();
    assert_eq!(read.cluster, cluster);
    assert_eq!((read.wishes, read.answer), (vec![], None));
}

proptest! {
    #[test]
    fn decoding_is_total(bytes: Vec<u8>) {
        // No bytes cause a panic, and what can be decoded can be encoded and decoded again.
        if let Ok(ask) = decode::<StoreRequest>(2, &bytes) {
            let again = frame(2, 0, &ask).unwrap();
            prop_assert!(decode::<StoreRequest>(2, &again[12..]).is_ok());
        }
        drop(decode::<StoreResponse>(2, &bytes));
        drop(decode::<PeerRequest>(2, &bytes));
        drop(read_hello(&bytes));
    }
}
