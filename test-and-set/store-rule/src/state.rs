//! The records of all VMs, and how many names each host owns.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::names::{PartyName, VmName};
use crate::record::{Asker, Command, CommandReply, Refusal, VmPhase, VmRecord, decide};

/// The records of all VMs that the store knows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "StoredRecords")]
pub struct StoreState {
    vms: BTreeMap<VmName, VmRecord>,
    /// Whether the store was restored from a backup, after which there may have been more VMs.
    restored: bool,
    /// How many names each host owns: derived from the records.
    #[serde(skip_serializing)]
    owned: BTreeMap<PartyName, u64>,
}

/// What is stored of a [`StoreState`].
#[derive(Deserialize)]
struct StoredRecords {
    vms: BTreeMap<VmName, VmRecord>,
    restored: bool,
}

static NOT_IN_BACKUP: VmRecord = VmRecord::NOT_IN_BACKUP;

impl From<StoredRecords> for StoreState {
    fn from(StoredRecords { vms, restored }: StoredRecords) -> Self {
        let mut owned = BTreeMap::new();
        for owner in vms.values().filter_map(|record| record.owner.clone()) {
            *owned.entry(owner).or_default() += 1;
        }
        Self { vms, restored, owned }
    }
}

impl StoreState {
    /// The state of a store that is restored from these records of a backup.
    pub fn restored(records: impl IntoIterator<Item = (VmName, VmRecord)>) -> Self {
        let restored = |(vm, record)| (vm, VmRecord { restored: true, ..record });
        StoredRecords { vms: records.into_iter().map(restored).collect(), restored: true }.into()
    }

    /// Applies a command. Commands must be applied in log order.
    pub fn apply(&mut self, vm: &VmName, command: &Command, asker: Option<&Asker>) -> CommandReply {
        let (changed, reply) = decide(self.get(vm), command, asker);
        if let Some(record) = changed {
            let owner = record.owner.clone();
            // The owner of a name never changes.
            if self.vms.insert(vm.clone(), record).is_none()
                && let Some(owner) = owner
            {
                *self.owned.entry(owner).or_default() += 1;
            }
        }
        reply
    }

    /// Applies a command, unless it would make a new name beyond the `names_max` names that a host may have.
    pub fn apply_within(
        &mut self,
        names_max: u64,
        vm: &VmName,
        command: &Command,
        asker: Option<&Asker>,
    ) -> CommandReply {
        if let (Command::Open { .. }, Some(host)) = (command, asker.and_then(|asker| asker.host.as_ref()))
            && self.names_of(host) >= names_max
            && !self.vms.contains_key(vm)
        {
            return CommandReply::Refused(Refusal::TooManyNames { host: host.clone(), most: names_max });
        }
        self.apply(vm, command, asker)
    }

    /// How many VM names this host has opened first. Names are never given back.
    pub fn names_of(&self, host: &PartyName) -> u64 {
        self.owned.get(host).copied().unwrap_or(0)
    }

    /// The record of a VM, forgotten or not.
    pub fn get(&self, vm: &VmName) -> Option<&VmRecord> {
        self.vms.get(vm).or(self.restored.then_some(&NOT_IN_BACKUP))
    }

    /// All VMs, also those that are forgotten, in the order of their names, starting after `after`.
    pub fn all(&self, after: Option<&VmName>) -> impl Iterator<Item = (&VmName, &VmRecord)> {
        use std::ops::Bound::{Excluded, Unbounded};
        let from = after.map_or(Unbounded, Excluded);
        self.vms.range::<VmName, _>((from, Unbounded))
    }

    /// The VMs that are not forgotten, in the order of their names, starting after `after`.
    pub fn list(&self, after: Option<&VmName>) -> impl Iterator<Item = (&VmName, &VmRecord)> {
        self.all(after).filter(|(_, r)| r.phase != VmPhase::Forgotten)
    }

    /// The number of known VMs, including forgotten ones.
    pub fn len(&self) -> usize {
        self.vms.len()
    }

    /// Whether the store knows no VM.
    pub fn is_empty(&self) -> bool {
        self.vms.is_empty()
    }
}
