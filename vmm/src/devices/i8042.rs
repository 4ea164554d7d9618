//! The part of the keyboard controller that resets the machine: no keyboard, no mouse, no interrupt.

/// Data port.
pub const DATA: u16 = 0x60;
/// Status and command port.
pub const COMMAND: u16 = 0x64;
/// Command that pulses output line 0, which resets the CPU.
const PULSE_RESET: u8 = 0xfe;

/// Serves a read of either port: the status says that both buffers are empty, and there is no data.
pub fn read(_port: u16) -> u8 {
    0
}

/// Serves a write to either port. Returns whether it resets the machine.
pub fn write(port: u16, value: u8) -> bool {
    port == COMMAND && value == PULSE_RESET
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_pulse_command_resets() {
        assert!(write(COMMAND, 0xfe));
        assert!(!write(DATA, 0xfe) && !write(COMMAND, 0xff));
        assert_eq!(read(COMMAND) & 3, 0, "the input buffer is free for a command");
    }
}
