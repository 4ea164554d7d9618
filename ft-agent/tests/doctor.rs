//! `vmft doctor` as a user sees it: on every host it has a verdict, and says why the verdict is not better.

use std::process::Command;

fn doctor(args: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_vmft")).arg("doctor").args(args).output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn every_host_has_a_verdict_with_its_reasons() {
    let report: serde_json::Value = serde_json::from_str(&doctor(&["--json"])).unwrap();
    let verdict = report["verdict"].as_str().unwrap();
    let checks = report["checks"].as_array().unwrap();
    let outcome = |name: &str| {
        let check = checks.iter().find(|c| c["name"] == name);
        check.map_or("missing", |c| c["outcome"].as_str().unwrap())
    };
    for check in checks {
        assert!(!check["reason"].as_str().unwrap().is_empty(), "{check}");
        assert_eq!(check["outcome"] == "fail", check["remedy"].is_string(), "{check}");
    }
    let because = report["because"].as_array().unwrap();
    assert_eq!(verdict == "exact", because.is_empty(), "{report}");
    assert!(["exact", "exact-with-retry", "sync-only", "unsupported"].contains(&verdict));
    // The verdict promises nothing that was not tested.
    if outcome("kvm") != "pass" {
        assert_eq!(verdict, "unsupported");
    } else if outcome("counter") != "pass" && outcome("replay by exits") == "pass" {
        assert_eq!(verdict, "sync-only");
        assert!(because.contains(&"counter".into()));
    }
    assert!(doctor(&[]).contains(&format!("verdict: {verdict}")));
}
