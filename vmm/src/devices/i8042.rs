//! The keyboard controller, as far as it resets the machine: no keyboard, no mouse, no interrupt.

/// Data port.
pub const DATA: u16 = 0x60;
/// Status and command port.
pub const COMMAND: u16 = 0x64;
/// Pulses output line 0, which is the CPU's reset.
const PULSE_RESET: u8 = 0xfe;

/// Reads either port: status says that both buffers are empty, data that there are none.
pub fn read(_port: u16) -> u8 {
    0
}

/// Writes either port: whether the machine is reset.
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
        assert_eq!(read(COMMAND) & 3, 0, "the input buffer takes a command");
    }
}
