use super::*;
use proptest::prelude::*;

/// Linux's periodic tick at 100 Hz: mode 2, 11932 pulses.
fn periodic(now_ns: u64) -> Pit {
    let mut pit = Pit::new();
    pit.write(0x43, 0x34, now_ns);
    pit.write(0x40, 0x9c, now_ns);
    pit.write(0x40, 0x2e, now_ns);
    pit
}

#[test]
fn a_periodic_tick_comes_every_count_pulses() {
    let mut pit = periodic(0);
    let mut last = 0;
    for tick in 1..=1000u64 {
        let deadline = pit.deadline_ns().unwrap();
        assert_eq!(deadline, time_of(1 + tick * 11932));
        assert!(!pit.advance(deadline - 1));
        assert!(pit.advance(deadline) && pit.line(deadline));
        assert!(deadline > last);
        last = deadline;
    }
    assert_eq!(last / 10_000, 1_000_015, "ten seconds and 15 ppm");
}

#[test]
fn missed_ticks_are_one() {
    let mut pit = periodic(0);
    assert!(pit.advance(1_000_000_000));
    assert!(!pit.advance(1_000_000_000));
    assert!(pit.deadline_ns().unwrap() > 1_000_000_000);
}

#[test]
fn mode_0_rises_at_the_end_and_stays() {
    let mut pit = Pit::new();
    pit.write(0x43, 0x30, 0);
    assert!(!pit.line(0));
    pit.write(0x40, 100, 0);
    assert_eq!(pit.deadline_ns(), None, "only half of the count is written");
    pit.write(0x40, 0, 0);
    let deadline = pit.deadline_ns().unwrap();
    assert_eq!(deadline, time_of(101), "N + 1 pulses");
    assert!(!pit.line(deadline - 1) && pit.line(deadline));
    assert!(pit.advance(deadline));
    assert_eq!(pit.deadline_ns(), None);
    assert!(pit.line(deadline * 1000));
}

#[test]
fn mode_4_strobes_once() {
    let mut pit = Pit::new();
    pit.write(0x43, 0x38, 0);
    pit.write(0x40, 10, 0);
    pit.write(0x40, 0, 0);
    assert!(pit.line(time_of(10)) && !pit.line(time_of(11)) && pit.line(time_of(12)));
    assert_eq!(pit.deadline_ns(), Some(time_of(12)));
    // A new count starts it again.
    pit.advance(time_of(20));
    pit.write(0x40, 5, time_of(20));
    pit.write(0x40, 0, time_of(20));
    assert_eq!(pit.deadline_ns(), Some(time_of(27)));
}

#[test]
fn mode_3_is_a_square_wave() {
    let mut pit = Pit::new();
    pit.write(0x43, 0x16, 0);
    pit.write(0x40, 5, 0);
    let wave: Vec<bool> = (1..=10).map(|pulse| pit.line(time_of(pulse))).collect();
    assert_eq!(wave, [true, true, true, false, false, true, true, true, false, false]);
    assert_eq!(pit.deadline_ns(), Some(time_of(6)));
}

#[test]
fn a_new_count_waits_for_the_end_of_the_round() {
    let mut pit = Pit::new();
    pit.write(0x43, 0x14, 0);
    pit.write(0x40, 100, 0);
    pit.write(0x40, 10, time_of(50));
    assert_eq!(pit.deadline_ns(), Some(time_of(101)));
    assert!(pit.advance(time_of(101)));
    assert_eq!(pit.deadline_ns(), Some(time_of(111)));
}

#[test]
fn counts_latch_and_read_back() {
    let mut pit = periodic(0);
    pit.write(0x43, 0x00, time_of(101));
    let later = time_of(5_000);
    let value = u16::from_le_bytes([pit.read(0x40, later), pit.read(0x40, later)]);
    assert_eq!(value, 11932 - 100, "the latch holds");
    pit.write(0x43, 0xc2, later);
    assert_eq!(pit.read(0x40, later), 0xb4, "status: OUT high, both bytes, mode 2");
    let value = u16::from_le_bytes([pit.read(0x40, later), pit.read(0x40, later)]);
    assert_eq!(value, 11932 - 4_999);
}

#[test]
fn calibration_through_port_61_sees_the_count_fall_and_out_rise() {
    // quick_pit_calibrate and pit_calibrate_tsc of Linux: counter 2, mode 0, gate by port 0x61.
    let mut pit = Pit::new();
    pit.write(0x61, pit.clone().read(0x61, 0) & !2 | 1, 0);
    pit.write(0x43, 0xb0, 0);
    pit.write(0x42, 0xff, 0);
    pit.write(0x42, 0xff, 0);
    let at = time_of(1 + 256);
    assert_eq!((pit.read(0x42, at), pit.read(0x42, at)), (0xff, 0xfe));
    assert_eq!(pit.read(0x61, at) & 0x20, 0);
    assert_ne!(pit.read(0x61, time_of(65_536)) & 0x20, 0);
}

#[test]
fn a_closed_gate_holds_the_count() {
    let mut pit = Pit::new();
    pit.write(0x61, 1, 0);
    pit.write(0x43, 0xb0, 0);
    pit.write(0x42, 100, 0);
    pit.write(0x42, 0, 0);
    pit.write(0x61, 0, time_of(51));
    assert_eq!(pit.read(0x42, time_of(500)), 50);
    pit.read(0x42, time_of(500));
    pit.write(0x61, 1, time_of(500));
    assert_eq!(pit.read(0x61, time_of(549)) & 0x20, 0);
    assert_ne!(pit.read(0x61, time_of(550)) & 0x20, 0);
}

#[test]
fn bcd_counts_are_decimal() {
    let mut pit = Pit::new();
    pit.write(0x43, 0x35, 0);
    pit.write(0x40, 0x00, 0);
    pit.write(0x40, 0x10, 0);
    assert_eq!(pit.deadline_ns(), Some(time_of(1_001)));
    let at = time_of(2);
    assert_eq!((pit.read(0x40, at), pit.read(0x40, at)), (0x99, 0x09));
}

proptest! {
    /// The computed rises are those of the wave looked at pulse by pulse.
    #[test]
    fn rises_are_those_of_the_wave(mode in 0u8..6, count in 2u32..40, after in 0u64..200) {
        let mut counter = PitCounter::new();
        counter.gate = !matches!(mode, 1 | 5);
        counter.set_mode(0x10 | mode << 1);
        counter.write(count as u8, 3);
        counter.set_gate(true, 3);
        let rise = (after + 1..after + 100).find(|&pulse| counter.out(pulse) && !counter.out(pulse - 1));
        prop_assert_eq!(counter.next_rise(after).filter(|rise| *rise < after + 100), rise);
    }

    /// Whatever a guest writes, nothing overflows and the deadline is in the future.
    #[test]
    fn any_program_is_survived(program in prop::collection::vec((0u8..5, any::<u8>(), 0u64..1 << 40), 1..200)) {
        let mut pit = Pit::new();
        let mut now = 0;
        for (port, value, step) in program {
            now += step;
            let port = [0x40, 0x41, 0x42, 0x43, 0x61][port as usize];
            pit.write(port, value, now);
            pit.read(port, now);
            pit.advance(now);
            prop_assert!(pit.deadline_ns().is_none_or(|deadline| deadline > now));
        }
    }
}
