//! Each [`Trap`], and what comes of leaving it alone.

use iced_x86::code_asm::*;

use super::*;

const SCHEDULES: u64 = 150;

/// Records and replays; `Err` says what went wrong.
fn run(bench: &mut Bench, program: &[u8], kicks: &[u64], setting: &Setting, seed: u64) -> Result<(), String> {
    let (inputs, ending) = bench.record(program, kicks, setting, seed).map_err(|e| format!("{e:?}"))?;
    let (again, _) = bench.replay(program, &inputs, setting, !seed).map_err(|e| format!("{e:?}"))?;
    if again == ending { Ok(()) } else { Err("another ending".into()) }
}

/// All schedules go right, and some of them wrong when the trap is left alone.
fn needed(trap: Trap, setting: Setting, program: impl Fn(u64) -> Vec<u8>) {
    let mut bench = Bench::new();
    let mut wrong = 0;
    for seed in 0..SCHEDULES {
        let mut chance = Chance::new(seed);
        let at = chance.below(1200);
        let kicks = [at, at + 1 + chance.below(12), at + 400];
        let program = program(seed);
        let setting = Setting { margin: 5, ..setting };
        if let Err(e) = run(&mut bench, &program, &kicks, &setting, seed) {
            panic!("{trap:?}, seed {seed}: {e}");
        }
        let careless = Setting { without: Some(trap), ..setting };
        wrong += u64::from(run(&mut bench, &program, &kicks, &careless, seed).is_err());
    }
    assert!(wrong > 0, "{trap:?} is not needed in any of {SCHEDULES} schedules");
}

#[test]
fn a_position_is_at_a_conditional_branch() {
    needed(Trap::Anywhere, Setting::default(), guest::random);
}

#[test]
fn a_position_is_in_no_shadow() {
    needed(Trap::Shadow, Setting::default(), guest::random);
}

#[test]
fn a_count_has_one_position() {
    needed(Trap::SameCount, Setting::default(), guest::random);
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
    needed(Trap::GuestDebugs, Setting::default(), debugs_itself);
}

#[test]
fn an_overflow_may_be_late() {
    let skid = Skid { late_max: 40, ..Skid::default() };
    needed(Trap::Late, Setting { skid, ..Setting::default() }, guest::random);
}

#[test]
fn an_overflow_may_never_come() {
    let skid = Skid { lost_one_in: 2, ..Skid::default() };
    needed(Trap::Lost, Setting { skid, ..Setting::default() }, guest::random);
}

#[test]
fn an_overflow_may_be_early_or_of_another_time() {
    let skid = Skid { early_one_in: 2, twice_one_in: 2, ..Skid::default() };
    needed(Trap::Early, Setting { skid, ..Setting::default() }, guest::random);
}

#[test]
fn the_breakpoint_is_hit_before_the_count() {
    needed(Trap::EarlierArrivals, Setting::default(), guest::random);
}

#[test]
fn the_resume_flag_may_have_no_effect() {
    let quirks = Quirks { ignores_resume_flag: true, ..Quirks::default() };
    needed(Trap::IgnoredResumeFlag, Setting { quirks, ..Setting::default() }, guest::random);
}

#[test]
fn a_stop_may_leave_the_resume_flag_set() {
    let quirks = Quirks { leaves_resume_flag_one_in: 2, ..Quirks::default() };
    needed(Trap::LeftResumeFlag, Setting { quirks, ..Setting::default() }, guest::random);
}

#[test]
fn the_counter_knows_nothing_of_restored_states() {
    let skid = Skid { late_max: 40, ..Skid::default() };
    needed(Trap::Restored, Setting { skid, ..Setting::default() }, guest::random);
}

#[test]
fn a_kick_is_answered_though_the_guest_leaves_by_itself() {
    let mut bench = Bench::new();
    let mut lost = 0;
    for seed in 0..SCHEDULES {
        let program = guest::random(seed);
        let setting = Setting { margin: 5, ..Setting::default() };
        let (inputs, _) = bench.record(&program, &[seed % 25], &setting, seed).unwrap();
        assert_eq!(inputs.len(), 1, "seed {seed} {:?} {}", bench.vcpu.landings(), bench.vcpu.host.retired());
        let careless = Setting { without: Some(Trap::OwedKick), ..setting };
        lost += u64::from(bench.record(&program, &[seed % 25], &careless, seed).unwrap().0.is_empty());
    }
    assert!(lost > 0);
}

/// Outcomes of replays with wrong counts: found, or the same ending, or another one that nobody noticed.
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
            // A count that was wrong is wrong at the end.
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
    let minded = outcomes(&miscounts, &careful, guest::random);
    assert!(minded.unnoticed == 0 && minded.found > 20, "{minded:?}");
    let careless = Setting { without: Some(Trap::Miscount), ..miscounts };
    let careless = outcomes(&careless, &careful, guest::random);
    assert!(careless.unnoticed > 0, "{careless:?}");
}

/// A loop, stepped by the guest itself in its first rounds.
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
    // So wide a margin that the whole loop goes by breakpoint, also where the guest steps itself.
    let quirks = Quirks { ignores_resume_flag: true, ..Quirks::default() };
    let setting = Setting { margin: 5000, quirks, ..Setting::default() };
    let minded = outcomes(&setting, &setting, steps_itself);
    assert!(minded.unnoticed == 0 && minded.found > 20, "{minded:?}");
    let careless = Setting { without: Some(Trap::LeakingTrapFlag), ..setting };
    let careless = outcomes(&careless, &setting, steps_itself);
    assert!(careless.unnoticed > 0, "{careless:?}");
}
