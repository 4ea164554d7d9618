use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::SignatureScheme;

use super::server::may_sign;
use super::*;
use crate::blocking::BlockingStore;
use crate::fake::FakeStore;
use crate::keys::{Keys, check_proof, make_set};
use crate::names::{Generation, Incarnation};
use crate::record::{Applied, Member, Members, Verdict};

const PATIENCE: Duration = Duration::from_secs(10);

/// A keeper of the keys of host `a` of these, on a thread, and what its replica has.
fn kept(dir: &std::path::Path, end: PairEnd) -> (Keys, KeptFiles) {
    make_set(dir, &[1], &["a".into(), "b".into()], &[]).unwrap();
    let (here, there) = UnixStream::pair().unwrap();
    let keys = Keys::load(&dir.join("a")).unwrap();
    let file = dir.join("file");
    let replace = move |number, text: &str| match number {
        0 => std::fs::write(&file, text),
        _ => Err(std::io::ErrorKind::PermissionDenied.into()),
    };
    std::thread::spawn(move || Keeper::serve(Ok(Keeper { keys, end, replace }), &there));
    kept_keys(here).unwrap()
}

#[test]
fn kept_keys_are_those_of_the_directory_also_once_they_are_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let (keys, files) = kept(dir.path(), PairEnd::Client);
    let [a, b] = ["a", "b"].map(|name| Keys::load(&dir.path().join(name)).unwrap().own());
    assert_eq!(keys.own().certificate(), a.certificate());
    assert_eq!(keys.peer(b.certificate()), Some("b".parse().unwrap()));
    let (scheme, signature) = keys.own().prove(&[7; 32]).unwrap();
    check_proof(a.certificate(), scheme, &signature, &[7; 32]).unwrap();
    files.replace(0, "text".into()).unwrap();
    assert_eq!(std::fs::read_to_string(dir.path().join("file")).unwrap(), "text");
    assert!(files.replace(1, "text".into()).is_err());
    let before = keys.own();
    for file in ["own.key", "own.crt"] {
        std::fs::copy(dir.path().join("b").join(file), dir.path().join("a").join(file)).unwrap();
    }
    let begun = Instant::now();
    while keys.own().certificate() != b.certificate() {
        assert!(begun.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(before.prove(&[7; 32]).is_err(), "the old key still signs");
}

#[test]
fn a_keeper_signs_only_handshakes_of_its_end() {
    let context = |who| [&[b' '; 64][..], format!("TLS 1.3, {who} CertificateVerify\0").as_bytes()].concat();
    let message = |who, hash: usize| [context(who), vec![9; hash]].concat();
    for (end, ours, other) in [(PairEnd::Client, "client", "server"), (PairEnd::Server, "server", "client")] {
        for hash in 0..100 {
            assert_eq!(may_sign(end, &message(ours, hash)), [32, 48].contains(&hash));
            assert!(!may_sign(end, &message(other, hash)));
            assert!(!may_sign(end, &vec![b' '; hash]));
        }
        assert!(!may_sign(end, &message(ours, 32)[1..]));
    }
    let dir = tempfile::tempdir().unwrap();
    let (keys, _) = kept(dir.path(), PairEnd::Server);
    let signer = keys.own().signing_key().choose_scheme(&[SignatureScheme::ECDSA_NISTP256_SHA256]).unwrap();
    assert!(signer.sign(&message("server", 32)).is_ok());
    let refused = signer.sign(&message("client", 32)).unwrap_err().to_string();
    assert!(refused.contains("only handshakes of the pair's link"), "{refused}");
}

#[test]
fn a_kept_store_answers_for_its_vm_and_says_when_the_keeper_is_lost() {
    let (here, there) = UnixStream::pair().unwrap();
    let vm: crate::names::VmName = "web".parse().unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let own = vm.clone();
    let serving = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            there.set_nonblocking(true).unwrap();
            let ends = tokio::net::UnixStream::from_std(there).unwrap();
            let url = "etcd://127.0.0.1:1".parse().unwrap();
            tokio::select! {
                _ = KeptVm { url, vm: own }.serve(Arc::new(FakeStore::default()), ends) => {}
                _ = stopped => {}
            }
        });
    });
    let store = BlockingStore::kept(here).unwrap();
    let (primary, backup) = (Incarnation::random(), Incarnation::random());
    let members = Members { primary: Member::new(primary), backup: Some(Member::new(backup)) };
    let generation = Generation::FIRST;
    assert_eq!(store.open(&vm, generation, &members, PATIENCE).unwrap(), Applied::Done);
    assert!(matches!(store.take(&vm, generation, backup, PATIENCE), Verdict::Won));
    assert!(
        matches!(store.take(&vm, generation, primary, PATIENCE), Verdict::Lost(holder) if holder == backup)
    );
    assert!(store.get(&vm, PATIENCE).unwrap().is_some());
    for refused in [
        store.get(&"mail".parse().unwrap(), PATIENCE).unwrap_err(),
        store.forget(&vm, generation, PATIENCE).unwrap_err(),
        store.list(None, PATIENCE).unwrap_err(),
    ] {
        assert!(refused.to_string().contains("does not ask the store for that"), "{refused}");
    }
    stop.send(()).unwrap();
    serving.join().unwrap();
    let lost = store.get(&vm, PATIENCE).unwrap_err().to_string();
    assert!(lost.contains("is lost"), "{lost}");
}
