//! The guest: a machine whose next state is a function of its state and its inputs at their positions. It
//! counts a client's requests, some of which need its disk first, and says something of its own now and then.

use entry::log::{LoggedOutput, OutputTo, StateCheck};
use entry::{Digest, DiskResult, Input, Output, Position};

use super::rng::mix;

/// A request of this number asks the guest to switch itself off.
pub const POWER_OFF: u64 = u64::MAX;

#[derive(Clone, Debug, Default)]
pub struct Guest {
    pub count: u64,
    pub hash: u64,
    /// Requests answered.
    done: u64,
    /// The request that waits for the disk, and the disk request's id.
    pub disk: Option<(u64, u64)>,
    disks: u64,
    /// The request that the next step answers.
    answer: Option<u64>,
    outputs: u64,
    pub is_off: bool,
}

/// The content of one of the guest's outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestOutput {
    /// The output's number in the guest's history.
    pub number: u64,
    /// Hash of everything that happened before it.
    pub hash: u64,
    /// The request that it answers, or 0.
    pub answers: u64,
}

impl Guest {
    pub fn position(&self) -> Position {
        Position::exact(self.count)
    }

    fn mix_in(&mut self, v: u64) {
        self.hash = mix(self.hash ^ v.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    }

    pub fn apply(&mut self, input: &Input) {
        self.mix_in(self.count ^ 0x5555);
        match input {
            Input::Frame { bytes, .. } => {
                let request = number(bytes, 14);
                self.mix_in(request);
                if request == POWER_OFF {
                    self.is_off = true;
                } else if request <= self.done {
                    self.answer = Some(request);
                } else if self.disk.is_none() && self.hash.is_multiple_of(3) {
                    self.disks += 1;
                    self.disk = Some((request, self.disks));
                } else if self.disk.is_none() {
                    self.finish(request);
                }
            }
            Input::DiskDone { id, .. } => {
                let (request, expected) = self.disk.take().expect("a disk request is open");
                assert_eq!(*id, expected, "another disk request");
                self.mix_in(*id);
                self.finish(request);
            }
            Input::Console { .. } | Input::Clock { .. } => {}
        }
    }

    fn finish(&mut self, request: u64) {
        if request == self.done + 1 {
            self.done = request;
        }
        self.answer = Some(request);
    }

    /// One instruction.
    pub fn step(&mut self) -> Option<Output> {
        self.count += 1;
        self.mix_in(self.count);
        let answers = match self.answer.take() {
            Some(request) => request,
            None if self.hash.is_multiple_of(97) => 0,
            None => return None,
        };
        let said = GuestOutput { number: self.outputs, hash: self.hash, answers };
        self.outputs += 1;
        Some(said.output())
    }

    pub fn digest(&self) -> StateCheck {
        let vcpu = Digest((self.hash ^ self.outputs) as u128).into();
        StateCheck { vcpu, devices: Digest(self.count as u128).into(), ram: Digest(self.done as u128).into() }
    }
}

impl GuestOutput {
    fn output(self) -> Output {
        let mut bytes = vec![0; 14];
        [self.number, self.hash, self.answers].into_iter().for_each(|v| bytes.extend(v.to_le_bytes()));
        Output::Frame { slot: 0, bytes }
    }

    pub fn of(output: &Output) -> GuestOutput {
        let Output::Frame { bytes, .. } = output else { panic!("the guest has no console") };
        GuestOutput { number: number(bytes, 14), hash: number(bytes, 22), answers: number(bytes, 30) }
    }
}

/// An output as it is logged.
pub fn logged(output: &Output) -> LoggedOutput {
    let said = GuestOutput::of(output);
    let digest = Digest(said.number as u128 ^ (said.hash as u128) << 64 ^ (said.answers as u128) << 32);
    LoggedOutput { to: OutputTo::Net(0), len: 38, digest }
}

/// A client's request. `filler` makes it longer, so that buffers fill.
pub fn request(number: u64, filler: usize) -> Input {
    let mut bytes = vec![0; 14];
    bytes.extend(number.to_le_bytes());
    bytes.resize(22 + filler, 0);
    Input::Frame { slot: 0, bytes }
}

pub fn disk_done(id: u64) -> Input {
    Input::DiskDone { slot: 1, id, result: DiskResult::Done }
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
