//! `vmft run` as a user sees it: options and errors, runs of the bare guest, digests and saved machines.

mod support;

use std::process::Command;

use support::vm::{VMFT, Vm};
use support::{digests, has_guest, image};

/// Runs vmft to its end: exit code, standard output, standard error.
fn vmft(args: &[&str]) -> (i32, String, String) {
    let output = Command::new(VMFT).args(args).stdin(std::process::Stdio::null()).output().expect("vmft");
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    (output.status.code().expect("ended by a signal"), text(&output.stdout), text(&output.stderr))
}

/// Runs the bare guest with this command line and further options.
fn bare(cmdline: &str, options: &[&str]) -> (i32, String, String) {
    let args = ["run", "--guest", "bare", "--memory-mib", "32", "--cmdline", cmdline];
    vmft(&[&args, options].concat())
}

fn scratch(name: &str) -> std::path::PathBuf {
    std::env::temp_dir().join(format!("vmft-test-{}-{name}", std::process::id()))
}

#[test]
fn errors_name_the_field_and_exit_with_two() {
    let cut = scratch("cut-elf");
    std::fs::write(&cut, b"\x7fELF\x02\x01\x01").unwrap();
    let config = scratch("config.toml");
    std::fs::write(&config, "kernal = 'x'\n").unwrap();
    let odd = scratch("odd-disk");
    std::fs::write(&odd, [0; 700]).unwrap();
    let (cut, config, odd) = (cut.to_str().unwrap(), config.to_str().unwrap(), odd.to_str().unwrap());
    for (args, expected) in [
        (vec![], "kernel"),
        (vec!["--kernel", "/nonexistent"], "cannot read kernel /nonexistent"),
        (vec!["--kernel", cut], cut),
        (vec!["--kernel", cut, "--memory-mib", "0"], "memory-mib"),
        (vec!["--kernel", cut, "--mac", "01:00:00:00:00:00", "--tap", "t"], "mac"),
        (vec!["--kernel", cut, "--disk", "/nonexistent"], "cannot open disk image /nonexistent"),
        (vec!["--kernel", cut, "--disk", odd], "700 bytes"),
        (vec!["--kernel", cut, "--ip", "10.0.0.2", "--tap", "t"], "is not ADDRESS/PREFIX"),
        (vec!["--kernel", cut, "--ip", "10.0.0.2/24"], "give --tap NAME, or leave --ip out"),
        (vec!["--kernel", cut, "--stop-at", "5", "--digest-at", "3,6"], "does not come to 6"),
        (vec!["--kernel", cut, "--stop-at", "5", "--save-at", "6", "--save", "s"], "does not come to 6"),
        (vec!["--kernel", cut, "--within", "5"], "--until"),
        (vec!["--kernel", cut, "--until", ""], "--until"),
        (vec!["--config", config], "kernal"),
        (vec!["--kernel", cut, "--stop-at", "5", "--clock", "host"], "clock"),
        (vec!["--no-such-flag"], "--no-such-flag"),
    ] {
        let (code, _, errors) = vmft(&[&["run"], args.as_slice()].concat());
        assert_eq!(code, 2, "{args:?}: {errors}");
        assert!(errors.contains(expected), "{args:?}: {errors}");
    }
    for file in [cut, config, odd] {
        std::fs::remove_file(file).unwrap();
    }
}

#[test]
fn an_image_in_another_format_is_not_taken_for_raw() {
    let image = scratch("format");
    let disk = image.to_str().unwrap();
    let cut = scratch("format-elf");
    std::fs::write(&cut, b"\x7fELF\x02\x01\x01").unwrap();
    for (at, magic, name) in
        [(0, &b"QFI\xfb"[..], "qcow2"), (0, b"KDMV", "VMDK"), (64, b"\x7f\x10\xda\xbe", "VDI")]
    {
        let mut bytes = vec![0; 4096];
        bytes[at..][..magic.len()].copy_from_slice(magic);
        std::fs::write(&image, bytes).unwrap();
        for (option, expected) in [
            (disk.to_owned(), format!("it is a {name} image")),
            (format!("{disk},ro"), format!("it is a {name} image")),
            // The next error is that of the kernel.
            (format!("{disk},raw"), cut.display().to_string()),
        ] {
            let (code, _, errors) = vmft(&["run", "--kernel", cut.to_str().unwrap(), "--disk", &option]);
            assert_eq!(code, 2, "{errors}");
            assert!(errors.contains(&expected), "{option}: {errors}");
            assert_eq!(errors.contains("qemu-img convert"), !option.ends_with("raw"), "{errors}");
        }
    }
    for file in [image, cut] {
        std::fs::remove_file(file).unwrap();
    }
}

#[test]
fn power_off_is_zero_and_a_crash_is_four() {
    if !has_guest("power_off_is_zero_and_a_crash_is_four", "bare") {
        return;
    }
    let json = scratch("summary.json");
    let (code, output, errors) = bare("workload=hello", &["--summary-json", json.to_str().unwrap()]);
    assert_eq!(code, 0, "{errors}");
    assert!(!output.is_empty(), "the guest says hello");
    let summary: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    assert!(summary["instructions"].as_u64().unwrap() > 1000, "{summary}");
    assert!(summary["pio"].as_u64().unwrap() > 0, "{summary}");
    std::fs::remove_file(json).unwrap();
    let (code, _, errors) = bare("workload=panic", &[]);
    assert_eq!(code, 4, "{errors}");
    assert!(errors.contains("triple fault"), "{errors}");
}

#[test]
fn until_ends_with_success_and_a_signal_ends_in_order() {
    if !has_guest("until_ends_with_success_and_a_signal_ends_in_order", "bare") {
        return;
    }
    let (code, output, errors) = bare("workload=spin every=100000", &["--until", "spin"]);
    assert_eq!(code, 0, "{errors}");
    assert!(output.contains("spin"), "{output}");
    let args = ["run", "--guest", "bare", "--memory-mib", "32", "--cmdline", "workload=spin every=100000"];
    let mut vm = Vm::start(Command::new(VMFT).args(args));
    vm.wait_for("spin", 20);
    let id = nix::unistd::Pid::from_raw(vm.id() as i32);
    nix::sys::signal::kill(id, nix::sys::signal::Signal::SIGTERM).unwrap();
    let (status, output) = vm.finish(20);
    assert!(status.success(), "{output}");
    assert!(output.contains("instructions in"), "no summary: {output}");
}

/// Splitmix64: the stops are random, but the same in every run of the test.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ *state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

#[test]
fn random_programs_give_the_same_digests_whole_stopped_and_restored() {
    const TEST: &str = "random_programs_give_the_same_digests_whole_stopped_and_restored";
    if !has_guest(TEST, "bare") {
        return;
    }
    let cases = std::env::var("VMFT_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(20);
    let mut state = 7;
    let file = scratch("saved");
    let file = file.to_str().unwrap();
    for case in 0..cases {
        let workload = ["spin", "mem mib=4"][(random(&mut state) % 2) as usize];
        let cmdline = format!("workload={workload} every=50000 seed={}", random(&mut state) % 1000);
        let mut stops: Vec<u64> = (0..4).map(|_| 1000 + random(&mut state) % 3_000_000).collect();
        stops.sort_unstable();
        let list = stops.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
        let end = stops[3].to_string();
        let whole = bare(&cmdline, &["--digest-at", &list, "--stop-at", &end]);
        let save =
            ["--digest-at", &list, "--stop-at", &end, "--save-at", &stops[1].to_string(), "--save", file];
        let again = bare(&cmdline, &save);
        assert_eq!((whole.0, again.0), (0, 0), "{}{}", whole.2, again.2);
        let expected = digests(&whole.2);
        assert_eq!(expected.len(), stops.len(), "{}", whole.2);
        assert_eq!(digests(&again.2), expected, "case {case}: {cmdline}");
        // The interpreter continues what translated code has begun.
        let go_on = ["--restore", file, "--digest-at", &list, "--stop-at", &end, "--cpu", "interpreter"];
        let rest = bare(&cmdline, &go_on);
        assert_eq!(rest.0, 0, "{}", rest.2);
        // Digests before the position at which the machine was saved are not taken again.
        assert_eq!(digests(&rest.2), expected[1..], "case {case}: {cmdline}");
        if case % 100 == 99 {
            eprintln!("{} of {cases} programs", case + 1);
        }
    }
    std::fs::remove_file(file).unwrap();
}

#[test]
fn a_saved_machine_is_refused_when_it_is_damaged_or_another() {
    const TEST: &str = "a_saved_machine_is_refused_when_it_is_damaged_or_another";
    if !has_guest(TEST, "bare") {
        return;
    }
    let saved = scratch("refused");
    let name = saved.to_str().unwrap();
    let (code, _, errors) =
        bare("workload=spin", &["--save-at", "500000", "--save", name, "--stop-at", "500000"]);
    assert_eq!(code, 0, "{errors}");
    let bytes = std::fs::read(&saved).unwrap();
    let refused = |cmdline: &str| {
        let (code, _, errors) = bare(cmdline, &["--restore", name, "--stop-at", "600000"]);
        assert_eq!(code, 2, "{errors}");
        errors
    };
    assert!(refused("workload=mem").contains("command line"));
    for (at, what) in [(0, 0xff), (bytes.len() / 2, 1), (bytes.len() - 1, 1)] {
        let mut damaged = bytes.clone();
        damaged[at] ^= what;
        std::fs::write(&saved, &damaged).unwrap();
        assert!(refused("workload=spin").contains(name));
    }
    std::fs::write(&saved, &bytes[..bytes.len() / 3]).unwrap();
    refused("workload=spin");
    std::fs::remove_file(saved).unwrap();
}

#[test]
fn the_bare_guest_boots_from_its_file() {
    // `--guest bare` is only a shorter name for the files.
    if !has_guest("the_bare_guest_boots_from_its_file", "bare") {
        return;
    }
    let kernel = image("bare", "kernel");
    let args =
        ["run", "--kernel", kernel.to_str().unwrap(), "--memory-mib", "16", "--cmdline", "workload=hello"];
    let (code, output, errors) = vmft(&args);
    assert_eq!(code, 0, "{output}{errors}");
}
