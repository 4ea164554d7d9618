//! Many schedules of programs, moments of inputs and skid, each made from a seed.

use super::*;

/// How many schedules have skid within the margin, and how many beyond it.
const WITHIN: u64 = 8_000;
const BEYOND: u64 = 4_000;

fn programs() -> Vec<Vec<u8>> {
    (0..64).map(guest::random).collect()
}

/// Up to six instruction counts, some of them close together.
fn kicks(chance: &mut Chance) -> Vec<u64> {
    let mut at = 0;
    let gaps = (0..1 + chance.below(6))
        .map(|_| if chance.one_in(3) { chance.below(30) } else { chance.below(1500) });
    let gaps: Vec<_> = gaps.collect();
    gaps.into_iter()
        .map(|gap| {
            at += gap;
            at
        })
        .collect()
}

fn quirks(chance: &mut Chance) -> Quirks {
    Quirks {
        ignores_resume_flag: chance.one_in(4),
        leaves_resume_flag_one_in: chance.below(4),
        signals_one_in: [0, 30, 400][chance.below(3) as usize],
    }
}

/// Sums over all schedules, to detect a test that tests too little.
#[derive(Debug, Default)]
struct Tally {
    inputs: usize,
    landed: u64,
    passed: u64,
    retries: u64,
}

fn schedules(seeds: std::ops::Range<u64>, skid: impl Fn(&mut Chance, u64) -> Skid) -> Tally {
    let programs = programs();
    let mut bench = Bench::new();
    let mut tally = Tally::default();
    for seed in seeds {
        let mut chance = Chance::new(seed);
        let program = &programs[chance.below(64) as usize];
        let kicks = kicks(&mut chance);
        let margin = 1 + chance.below(30);
        let mut setting = Setting { margin, quirks: quirks(&mut chance), ..Setting::default() };
        let recorded = bench.record(program, &kicks, &setting, seed);
        let (inputs, ending) = recorded.unwrap_or_else(|e| panic!("seed {seed}: recording: {e:?}"));
        setting.skid = skid(&mut chance, margin);
        setting.quirks = quirks(&mut chance);
        let replayed = bench.replay(program, &inputs, &setting, !seed);
        let (again, retries) = replayed.unwrap_or_else(|e| panic!("seed {seed}: replay: {e:?}"));
        assert_eq!(again, ending, "seed {seed}");
        tally.inputs += inputs.len();
        let stats = bench.vcpu.landings();
        (tally.landed, tally.passed) = (tally.landed + stats.landed, tally.passed + stats.passed);
        tally.retries += retries;
    }
    tally
}

#[test]
fn any_skid_within_the_margin_replays_identically() {
    let tally = schedules(0..WITHIN, |chance, margin| Skid {
        late_max: chance.below(margin + 1),
        early_one_in: chance.below(5),
        lost_one_in: 0,
        twice_one_in: chance.below(4),
    });
    assert_eq!(tally.retries, 0);
    assert!(tally.landed > WITHIN / 2 && tally.passed > WITHIN, "{tally:?}");
}

#[test]
fn skid_beyond_the_margin_is_reported_and_the_next_try_lands() {
    let tally = schedules(WITHIN..WITHIN + BEYOND, |chance, margin| Skid {
        late_max: margin * (2 + chance.below(20)),
        early_one_in: chance.below(5),
        lost_one_in: chance.below(6),
        twice_one_in: chance.below(4),
    });
    assert!(tally.retries > 200 && tally.landed > BEYOND / 2, "{tally:?}");
}

#[test]
fn a_counter_that_stops_counting_is_an_error() {
    let mut bench = Bench::new();
    let program = guest::random(1);
    bench.start(&program, &Setting { margin: 10, ..Setting::default() }, 1);
    bench.vcpu.engine.simulated_counter().broken = true;
    let failed = bench.run(&mut Vec::new(), |_, _| None);
    assert!(matches!(failed, Err(Failure::Vcpu(VcpuError::Landing(_)))), "{failed:?}");
}

#[test]
fn a_changed_position_is_found_at_once() {
    let mut bench = Bench::new();
    let setting = Setting { margin: 10, ..Setting::default() };
    let mut tried = 0;
    for seed in 0..200 {
        let program = guest::random(seed);
        let (mut inputs, _) = bench.record(&program, &[300, 700], &setting, seed).unwrap();
        let Some(input) = inputs.iter_mut().find(|i| i.at.rip != 0) else { continue };
        match seed % 3 {
            0 => input.at.within += 1,
            1 => input.at.registers ^= 1,
            _ => input.at.rip += 1,
        }
        tried += 1;
        assert!(bench.replay(&program, &inputs, &setting, seed).is_err(), "seed {seed}");
    }
    assert!(tried > 50);
}
