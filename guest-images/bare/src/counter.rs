//! The counter service: one counter for the whole machine, whose every reply proves the history that led to it.
//!
//! A request is a line that ends with LF (a CR before it is dropped), at most [`LINE_LEN_MAX`] bytes long. Each request,
//! also one that is not understood, gets exactly one line in reply:
//!
//! ```text
//! VERDICT SEQUENCE VALUE HISTORY MS
//! ok 3 42 8d3e1f0c55aa9b27 1230
//! ```
//!
//! | field | meaning |
//! |---|---|
//! | VERDICT | `ok`, or `err` for a request that is not understood and changed nothing but the history |
//! | SEQUENCE | this request's number, counted from 1 over all connections and the console since boot |
//! | VALUE | the counter after this request, a signed decimal number |
//! | HISTORY | 64-bit FNV-1a, in 16 hexadecimal digits, over all requests so far in order, each with one LF |
//! | MS | the guest's time since boot in milliseconds |
//!
//! Requests: `get`; `add N`, which adds a signed decimal N and wraps at 64 bits; `poweroff`, `reboot` and `crash`,
//! which do so without a reply. A longer line closes its connection and is no request.

use core::fmt;

/// Bytes in a request, without its line end.
pub const LINE_LEN_MAX: usize = 120;

/// Bytes in a reply with its LF, at most.
pub const REPLY_LEN_MAX: usize = 84;

const FNV_START: u64 = 0xcbf2_9ce4_8422_2325;
const FNV_PRIME: u64 = 0x0100_0000_01b3;

/// 64-bit FNV-1a of `bytes`, continued from `hash`.
fn fnv1a(hash: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(hash, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(FNV_PRIME))
}

/// The counter and its history.
pub struct Counter {
    value: i64,
    requests: u64,
    history: u64,
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Send this line.
    Reply(Reply),
    /// Turn the machine off.
    PowerOff,
    /// Reset the machine.
    Reboot,
    /// Crash the machine.
    Crash,
}

/// A line of reply, displayed without its LF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    understood: bool,
    sequence: u64,
    value: i64,
    history: u64,
    ms: u64,
}

impl Counter {
    /// The counter at boot.
    pub const fn new() -> Self {
        Self { value: 0, requests: 0, history: FNV_START }
    }

    /// Serves one request: a line without its end, at the guest's time `ms`.
    pub fn request(&mut self, line: &[u8], ms: u64) -> Outcome {
        let addend = match line {
            b"get" => Some(0),
            b"poweroff" => return Outcome::PowerOff,
            b"reboot" => return Outcome::Reboot,
            b"crash" => return Outcome::Crash,
            _ => line.strip_prefix(b"add ").and_then(|n| str::from_utf8(n).ok()?.parse().ok()),
        };
        self.value = self.value.wrapping_add(addend.unwrap_or(0));
        self.requests += 1;
        self.history = fnv1a(fnv1a(self.history, line), b"\n");
        let Self { value, requests: sequence, history } = *self;
        Outcome::Reply(Reply { understood: addend.is_some(), sequence, value, history, ms })
    }
}

impl Default for Counter {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { sequence, value, history, ms, .. } = self;
        write!(f, "{} {sequence} {value} {history:016x} {ms}", if self.understood { "ok" } else { "err" })
    }
}

/// Collects the bytes of one connection into lines.
#[derive(Clone, Copy)]
pub struct Lines {
    bytes: [u8; LINE_LEN_MAX + 1],
    len: usize,
}

/// What [`Lines::take`] found.
#[derive(Debug, PartialEq, Eq)]
pub enum Line<'a> {
    /// A whole line, without its end.
    Whole(&'a [u8]),
    /// Not yet.
    Partial,
    /// The line is longer than [`LINE_LEN_MAX`]; this connection cannot go on.
    TooLong,
}

impl Lines {
    /// No bytes yet.
    pub const fn new() -> Self {
        Self { bytes: [0; LINE_LEN_MAX + 1], len: 0 }
    }

    /// Takes bytes up to and including the next line's end. Returns how many it took, and what they made.
    pub fn take(&mut self, input: &[u8]) -> (usize, Line<'_>) {
        let end = input.iter().position(|&byte| byte == b'\n');
        let part = &input[..end.unwrap_or(input.len())];
        let Some(room) = self.bytes[self.len..].get_mut(..part.len()) else {
            return (0, Line::TooLong);
        };
        room.copy_from_slice(part);
        self.len += part.len();
        if end.is_none() {
            return (part.len(), Line::Partial);
        }
        let line = &self.bytes[..core::mem::take(&mut self.len)];
        match line.strip_suffix(b"\r").unwrap_or(line) {
            line if line.len() > LINE_LEN_MAX => (0, Line::TooLong),
            line => (part.len() + 1, Line::Whole(line)),
        }
    }
}

impl Default for Lines {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(counter: &mut Counter, line: &str, ms: u64) -> String {
        match counter.request(line.as_bytes(), ms) {
            Outcome::Reply(reply) => reply.to_string(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn fnv_is_the_published_one() {
        assert_eq!(fnv1a(FNV_START, b"foobar"), 0x8594_4171_f739_67e8);
    }

    #[test]
    fn replies_prove_the_history() {
        let mut counter = Counter::new();
        assert_eq!(
            reply(&mut counter, "add 40", 10),
            format!("ok 1 40 {:016x} 10", fnv1a(FNV_START, b"add 40\n"))
        );
        reply(&mut counter, "add -2", 20);
        let history = fnv1a(FNV_START, b"add 40\nadd -2\nwhat\nget\n");
        assert!(reply(&mut counter, "what", 30).starts_with("err 3 38 "));
        assert_eq!(reply(&mut counter, "get", 30), format!("ok 4 38 {history:016x} 30"));
    }

    #[test]
    fn add_wraps_and_takes_only_numbers() {
        let mut counter = Counter::new();
        reply(&mut counter, "add 9223372036854775807", 0);
        assert!(reply(&mut counter, "add 1", 0).starts_with("ok 2 -9223372036854775808 "));
        for line in ["add", "add ", "add x", "add 9223372036854775808", "add 1 ", " get", "GET", ""] {
            assert!(reply(&mut counter, line, 0).starts_with("err "), "{line:?}");
        }
    }

    #[test]
    fn the_longest_reply_fits() {
        let reply =
            Reply { understood: false, sequence: u64::MAX, value: i64::MIN, history: u64::MAX, ms: u64::MAX };
        assert_eq!(reply.to_string().len() + 1, REPLY_LEN_MAX);
    }

    #[test]
    fn the_ends_of_the_machine() {
        let mut counter = Counter::new();
        assert_eq!(counter.request(b"poweroff", 0), Outcome::PowerOff);
        assert_eq!(counter.request(b"reboot", 0), Outcome::Reboot);
        assert_eq!(counter.request(b"crash", 0), Outcome::Crash);
        assert!(reply(&mut counter, "get", 0).starts_with("ok 1 0 "));
    }

    #[test]
    fn lines_come_out_whole_however_they_came_in() {
        let input = b"get\r\n\nadd 5\nrest";
        for chunk in 1..input.len() {
            let (mut lines, mut out) = (Lines::new(), Vec::new());
            for mut part in input.chunks(chunk) {
                while !part.is_empty() {
                    let (taken, line) = lines.take(part);
                    if let Line::Whole(line) = line {
                        out.push(String::from_utf8(line.to_vec()).unwrap());
                    }
                    part = &part[taken..];
                }
            }
            assert_eq!(out, ["get", "", "add 5"], "chunks of {chunk}");
        }
    }

    #[test]
    fn a_line_may_be_just_so_long() {
        let longest = [&[b'x'; LINE_LEN_MAX][..], b"\r\n"].concat();
        assert_eq!(Lines::new().take(&longest), (122, Line::Whole(&longest[..LINE_LEN_MAX])));
        let longer = [&[b'x'; LINE_LEN_MAX + 1][..], b"\n"].concat();
        assert_eq!(Lines::new().take(&longer).1, Line::TooLong);
        let mut lines = Lines::new();
        assert_eq!(lines.take(&[b'x'; LINE_LEN_MAX + 1]).1, Line::Partial);
        assert_eq!(lines.take(b"x").1, Line::TooLong);
    }
}
