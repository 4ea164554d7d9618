//! Tests each [`Hazard`], and that positions are wrong if it is not handled.

use iced_x86::code_asm::*;

use super::*;

const SCHEDULES: u64 = 150;

/// Records and replays a program. `Err` says what went wrong.
fn run(bench: &mut Bench, program: &[u8], kicks: &[u64], setting: &Setting, seed: u64) -> Result<(), String> {
    let (inputs, ending) = bench.record(program, kicks, setting, seed).map_err(|e| format!("{e:?}"))?;
    let (again, _) = bench.replay(program, &inputs, setting, !seed).map_err(|e| format!("{e:?}"))?;
    if again == ending { Ok(()) } else { Err("the replay ended in another state".into()) }
}

/// Checks that all schedules replay correctly, and that some do not if the hazard is not handled.
fn assert_needed(hazard: Hazard, setting: Setting, program: impl Fn(u64) -> Vec<u8>) {
    let mut bench = Bench::new();
    let mut wrong = 0;
    for seed in 0..SCHEDULES {
        let mut chance = Chance::new(seed);
        let at = chance.below(1200);
        let kicks = [at, at + 1 + chance.below(12), at + 400];
        let program = program(seed);
        let setting = Setting { margin: 5, ..setting };
        if let Err(e) = run(&mut bench, &program, &kicks, &setting, seed) {
            panic!("{hazard:?}, seed {seed}: {e}");
        }
        let careless = Setting { ignored: Some(hazard), ..setting };
        wrong += u64::from(run(&mut bench, &program, &kicks, &careless, seed).is_err());
    }
    assert!(wrong > 0, "{hazard:?} made no difference in {SCHEDULES} schedules");
}

#[test]
fn a_position_is_at_a_conditional_branch() {
    assert_needed(Hazard::AmbiguousPlace, Setting::default(), guest::random);
}

#[test]
fn a_position_is_in_no_shadow() {
    assert_needed(Hazard::Shadow, Setting::default(), guest::random);
}

#[test]
fn a_count_has_one_position() {
    assert_needed(Hazard::SameCount, Setting::default(), guest::random);
}

/// A guest with a breakpoint on its own loop.
fn debugs_itself(_: u64) -> Vec<u8> {
    guest::program(|a| {
        let mut again = a.create_label();
        a.lea(rax, qword_ptr(again))?;
        a.mov(dr0, rax)?;
        a.mov(eax, 1)?;
        a.mov(dr7, rax)?;
        a.mov(ecx, 500)?;
        a.set_label(&mut again)?;
        a.add(rbx, rcx)?;
        a.dec(ecx)?;
        a.jnz(again)
    })
}

#[test]
fn a_guest_that_debugs_itself_is_stopped_at_its_exits() {
    assert_needed(Hazard::GuestDebugs, Setting::default(), debugs_itself);
}

#[test]
fn an_overflow_may_be_late() {
    let skid = Skid { late_max: 40, ..Skid::default() };
    assert_needed(Hazard::LateOverflow, Setting { skid, ..Setting::default() }, guest::random);
}

#[test]
fn an_overflow_may_never_come() {
    let skid = Skid { lost_one_in: 2, ..Skid::default() };
    assert_needed(Hazard::LostOverflow, Setting { skid, ..Setting::default() }, guest::random);
}

#[test]
fn an_overflow_may_be_early_or_of_another_time() {
    let skid = Skid { early_one_in: 2, twice_one_in: 2, ..Skid::default() };
    assert_needed(Hazard::EarlyOverflow, Setting { skid, ..Setting::default() }, guest::random);
}

#[test]
fn the_breakpoint_is_hit_before_the_count() {
    assert_needed(Hazard::EarlierArrivals, Setting::default(), guest::random);
}

#[test]
fn the_resume_flag_may_have_no_effect() {
    let quirks = Quirks { ignores_resume_flag: true, ..Quirks::default() };
    assert_needed(Hazard::IgnoredResumeFlag, Setting { quirks, ..Setting::default() }, guest::random);
}

#[test]
fn a_stop_may_leave_the_resume_flag_set() {
    let quirks = Quirks { leaves_resume_flag_one_in: 2, ..Quirks::default() };
    assert_needed(Hazard::LeftResumeFlag, Setting { quirks, ..Setting::default() }, guest::random);
}

#[test]
fn the_counter_knows_nothing_of_restored_states() {
    let skid = Skid { late_max: 40, ..Skid::default() };
    assert_needed(Hazard::Restored, Setting { skid, ..Setting::default() }, guest::random);
}

#[test]
fn a_kick_is_answered_though_the_guest_leaves_by_itself() {
    let mut bench = Bench::new();
    let mut lost = 0;
    for seed in 0..SCHEDULES {
        let program = guest::random(seed);
        let setting = Setting { margin: 5, ..Setting::default() };
        let (inputs, _) = bench.record(&program, &[seed % 25], &setting, seed).unwrap();
        assert_eq!(
            inputs.len(),
            1,
            "seed {seed} {:?} {}",
            bench.vcpu.landings(),
            bench.vcpu.engine.retired()
        );
        let careless = Setting { ignored: Some(Hazard::OwedKick), ..setting };
        lost += u64::from(bench.record(&program, &[seed % 25], &careless, seed).unwrap().0.is_empty());
    }
    assert!(lost > 0);
}

/// Outcomes of replays with wrong counts: detected, or the recorded ending, or another ending without an error.
#[derive(Debug, Default)]
struct Outcomes {
    found: u32,
    same: u32,
    unnoticed: u32,
}

fn outcomes(setting: &Setting, careful: &Setting, program: impl Fn(u64) -> Vec<u8>) -> Outcomes {
    let mut bench = Bench::new();
    let mut outcomes = Outcomes::default();
    for seed in 0..SCHEDULES {
        let program = program(seed);
        let (inputs, ending) = bench.record(&program, &[seed * 5], careful, seed).unwrap();
        match bench.replay(&program, &inputs, setting, !seed) {
            Err(_) => outcomes.found += 1,
            // A count that was wrong is still wrong at the end, so it is not compared.
            Ok((again, _)) if (Ending { at: ending.at, ..again }) == ending => outcomes.same += 1,
            Ok(_) => outcomes.unnoticed += 1,
        }
    }
    outcomes
}

#[test]
fn a_counter_that_miscounts_is_found() {
    let careful = Setting { margin: 5, ..Setting::default() };
    let miscounts = Setting { miscounts_one_in: 60, ..careful };
    let handled = outcomes(&miscounts, &careful, guest::random);
    assert!(handled.unnoticed == 0 && handled.found > 20, "{handled:?}");
    let careless = Setting { ignored: Some(Hazard::Miscount), ..miscounts };
    let careless = outcomes(&careless, &careful, guest::random);
    assert!(careless.unnoticed > 0, "{careless:?}");
}

/// A loop whose first rounds the guest single-steps itself.
fn steps_itself(_: u64) -> Vec<u8> {
    guest::program(|a| {
        let mut again = a.create_label();
        let mut over = a.create_label();
        a.pushfq()?;
        a.or(dword_ptr(rsp), 0x100)?;
        a.popfq()?;
        a.mov(ecx, 600)?;
        a.set_label(&mut again)?;
        a.add(rbx, rcx)?;
        a.cmp(ecx, 590)?;
        a.jne(over)?;
        a.pushfq()?;
        a.and(dword_ptr(rsp), !0x100)?;
        a.popfq()?;
        a.set_label(&mut over)?;
        a.dec(ecx)?;
        a.jnz(again)
    })
}

#[test]
fn no_step_where_the_trap_flag_would_show() {
    // The margin is so wide that the whole loop runs by breakpoint, also where the guest steps itself.
    let quirks = Quirks { ignores_resume_flag: true, ..Quirks::default() };
    let setting = Setting { margin: 5000, quirks, ..Setting::default() };
    let handled = outcomes(&setting, &setting, steps_itself);
    assert!(handled.unnoticed == 0 && handled.found > 20, "{handled:?}");
    let careless = Setting { ignored: Some(Hazard::LeakingTrapFlag), ..setting };
    let careless = outcomes(&careless, &setting, steps_itself);
    assert!(careless.unnoticed > 0, "{careless:?}");
}
