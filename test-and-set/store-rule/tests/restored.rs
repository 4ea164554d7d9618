//! What a store that was restored from a backup answers about VMs of which it does not know the end.

use store_rule::names::{Generation, Incarnation, VmName};
use store_rule::record::{Command, CommandReply, Member, Members, Refusal, VmPhase, VmRecord, decide};
use store_rule::state::StoreState;

const RESTORED: CommandReply = CommandReply::Refused(Refusal::Restored);

fn who(n: u128) -> Incarnation {
    Incarnation::try_from(n).unwrap()
}

fn take(generation: u64, n: u128) -> Command {
    Command::Take { generation: Generation(generation), who: who(n) }
}

fn open(generation: u64, primary: u128, backup: u128) -> Command {
    let members = Members { primary: Member::new(who(primary)), backup: Some(Member::new(who(backup))) };
    Command::Open { generation: Generation(generation), members }
}

struct RestoredVm(VmRecord);

impl RestoredVm {
    /// The record after these commands, in a store that is then restored.
    fn after(commands: &[Command]) -> Self {
        let mut record: Option<VmRecord> = None;
        for command in commands {
            record = decide(record.as_ref(), command, None).0.or(record);
        }
        Self(VmRecord { restored: true, ..record.unwrap() })
    }

    fn ask(&mut self, command: &Command) -> CommandReply {
        let (changed, reply) = decide(Some(&self.0), command, None);
        self.0 = changed.unwrap_or_else(|| self.0.clone());
        reply
    }

    /// A new pair, which is opened as a client does it: by the record.
    fn opens_anew(&mut self, primary: u128, backup: u128) -> u64 {
        let next = self.0.next_generation().unwrap().0;
        assert_eq!(self.ask(&open(next, primary, backup)), CommandReply::Done);
        next
    }
}

#[test]
fn nobody_wins_who_had_not_won_by_the_backup() {
    let mut vm = RestoredVm::after(&[open(1, 1, 2)]);
    assert_eq!(vm.ask(&take(1, 1)), RESTORED);
    assert_eq!(vm.ask(&take(1, 2)), RESTORED);
    assert_eq!(vm.0.holder(), None);
    let mut vm = RestoredVm::after(&[open(1, 1, 2), take(1, 2)]);
    assert_eq!(vm.ask(&take(1, 2)), CommandReply::Won);
    assert_eq!(vm.ask(&take(1, 1)), CommandReply::Lost(who(2)));
    // The holder may protect itself anew.
    assert_eq!(vm.ask(&open(2, 2, 3)), CommandReply::Done);
    assert_eq!(vm.ask(&take(2, 3)), CommandReply::Won);
}

#[test]
fn a_generation_that_was_opened_after_the_backup_is_not_taken_for_an_old_one() {
    // Its members stay silent, and do not halt: one of them may be the only one that runs the VM.
    let mut vm = RestoredVm::after(&[open(1, 1, 2), take(1, 1)]);
    assert_eq!(vm.ask(&take(2, 1)), RESTORED);
    assert_eq!(vm.ask(&take(3, 7)), RESTORED);
    assert_eq!(vm.ask(&open(4, 7, 8)), RESTORED);
    assert_eq!(vm.ask(&Command::End { generation: Generation(2), who: who(1) }), RESTORED);
}

#[test]
fn an_end_or_an_operator_lets_the_vm_start_again_with_a_generation_that_nobody_has_used() {
    let end = Command::End { generation: Generation(1), who: who(1) };
    for release in [end, Command::Forget { generation: Generation(1) }] {
        let mut vm = RestoredVm::after(&[open(1, 1, 2)]);
        assert_eq!(vm.ask(&release), CommandReply::Done);
        assert_eq!(vm.ask(&release), CommandReply::Done);
        assert_eq!((&vm.0.phase, vm.0.holder()), (&VmPhase::Forgotten, None));
        // The generation 2 may have been opened and won after the backup.
        assert_eq!(vm.ask(&open(2, 3, 4)), RESTORED);
        assert_eq!(vm.ask(&take(2, 9)), RESTORED);
        let next = vm.opens_anew(3, 4);
        assert!(next > 1 << 20);
        assert_eq!(vm.ask(&take(2, 9)), CommandReply::Stale);
        assert_eq!(vm.ask(&take(1, 2)), CommandReply::Stale);
        assert_eq!(vm.ask(&take(next, 4)), CommandReply::Won);
        assert_eq!(vm.0.next_generation(), Some(Generation(next + 1)));
    }
}

#[test]
fn a_vm_that_is_not_in_the_backup_starts_far_ahead_too() {
    let mut state = StoreState::restored([]);
    let vm: VmName = "vm".parse().unwrap();
    assert_eq!(state.apply(&vm, &take(1, 1), None), RESTORED);
    assert_eq!(state.apply(&vm, &open(1, 1, 2), None), RESTORED);
    let next = state.get(&vm).unwrap().next_generation().unwrap();
    assert_eq!(state.apply(&vm, &open(next.0, 1, 2), None), CommandReply::Done);
    assert_eq!(state.apply(&vm, &take(next.0, 1), None), CommandReply::Won);
    assert_eq!(state.len(), 1);
}
