//! A client that opens, takes and reads VMs again and again. Every call must be answered, and all answers must be those of one
//! store.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use test_and_set::checker::{self, Call, Observed, Operation};
use test_and_set::names::{Generation, Incarnation, VmName};
use test_and_set::record::{Asker, Command, CommandReply, Member, Members};
use test_and_set::store::TestAndSet;

/// How long a call may take: the members that it needs may be in the middle of an election, more than once.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(5);
/// The number of generations of each VM.
const GENERATIONS: u64 = 12;
/// The name of the client's host in the store.
const HOST: &str = "client";

struct SteadyClient<'s> {
    store: &'s dyn TestAndSet,
    begun: Instant,
    history: BTreeMap<VmName, Vec<Operation>>,
    slowest: Duration,
}

impl SteadyClient<'_> {
    async fn call(&mut self, vm: &VmName, call: Call) -> Result<Observed, String> {
        let asked = Instant::now();
        let answer = match &call {
            Call::Command(command) => {
                self.store.command(vm, command, asked + PATIENCE).await.map(Observed::Reply)
            }
            Call::Get => self.store.get(vm, asked + PATIENCE).await.map(Observed::Record),
        };
        let seen = answer.map_err(|e| format!("{vm}: no answer to {call:?}: {e}"))?;
        let at = |time: Instant| time.duration_since(self.begun).as_nanos() as u64;
        let ended = Some((at(Instant::now()), seen.clone()));
        let asker = Some(Asker { host: Some(HOST.parse().expect("a name")), operator: None });
        let operation = Operation { begun: at(asked), ended, asker, call };
        self.slowest = self.slowest.max(asked.elapsed());
        self.history.entry(vm.clone()).or_default().push(operation);
        tokio::time::sleep(PAUSE).await;
        Ok(seen)
    }

    async fn expect(&mut self, vm: &VmName, command: Command, expected: CommandReply) -> Result<(), String> {
        match self.call(vm, Call::Command(command.clone())).await? {
            Observed::Reply(reply) if reply == expected => Ok(()),
            other => Err(format!("{vm}: {command:?} is answered {other:?}, not {expected:?}")),
        }
    }

    /// A VM's life: generations that its backup and its primary win by turns.
    async fn use_vm(&mut self, vm: &VmName) -> Result<(), String> {
        let mut primary = Incarnation::random();
        for number in 1..=GENERATIONS {
            let (generation, backup) = (Generation(number), Incarnation::random());
            let members = Members { primary: Member::new(primary), backup: Some(Member::new(backup)) };
            self.expect(vm, Command::Open { generation, members }, CommandReply::Done).await?;
            let [winner, loser] = if number % 2 == 0 { [primary, backup] } else { [backup, primary] };
            self.expect(vm, Command::Take { generation, who: winner }, CommandReply::Won).await?;
            self.expect(vm, Command::Take { generation, who: loser }, CommandReply::Lost(winner)).await?;
            match self.call(vm, Call::Get).await? {
                Observed::Record(Some(record)) if record.holder() == Some(winner) => {}
                other => return Err(format!("{vm}: {winner} has won, and the record is {other:?}")),
            }
            primary = winner;
        }
        Ok(())
    }
}

/// Uses VMs, whose names begin with `name`, until told to stop. Returns what was done, in words.
///
/// # Errors
/// A call was not answered, or the answers are not those of one store.
pub async fn use_store(store: &dyn TestAndSet, name: &str, stop: &AtomicBool) -> Result<String, String> {
    let begun = Instant::now();
    let mut client = SteadyClient { store, begun, history: BTreeMap::new(), slowest: Duration::ZERO };
    for number in 0.. {
        if stop.load(Relaxed) {
            break;
        }
        let vm = format!("{name}-{number}").parse().map_err(|e| format!("{name}: {e}"))?;
        client.use_vm(&vm).await?;
    }
    checker::check(&client.history).map_err(|violation| violation.to_string())?;
    let calls: usize = client.history.values().map(Vec::len).sum();
    Ok(format!("{name}: {calls} calls in {:.1?}, the slowest took {:.0?}", begun.elapsed(), client.slowest))
}
