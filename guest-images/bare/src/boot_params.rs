//! The zero page that a Linux boot loader hands over (Documentation/arch/x86/zero-page.rst).

/// Bytes in the zero page.
pub const LEN: usize = 4096;

const EXT_CMD_LINE_PTR: usize = 0x0c8;
const E820_ENTRIES: usize = 0x1e8;
const CMD_LINE_PTR: usize = 0x228;
const E820_TABLE: usize = 0x2d0;
const E820_ENTRY_LEN: usize = 20;
const E820_ENTRIES_MAX: usize = 128;
const E820_RAM: u32 = 1;

/// A zero page as it lies in memory.
pub struct BootParams<'a>(pub &'a [u8; LEN]);

impl BootParams<'_> {
    /// Physical address of the zero-terminated command line; 0 if there is none.
    pub fn command_line_address(&self) -> u64 {
        u64::from(self.u32(CMD_LINE_PTR)) | u64::from(self.u32(EXT_CMD_LINE_PTR)) << 32
    }

    /// End of the RAM region that contains `address`; `None` if no region does.
    pub fn ram_end(&self, address: u64) -> Option<u64> {
        let entries = usize::from(self.0[E820_ENTRIES]).min(E820_ENTRIES_MAX);
        (0..entries).map(|i| E820_TABLE + i * E820_ENTRY_LEN).find_map(|at| {
            let (start, len, kind) = (self.u64(at), self.u64(at + 8), self.u32(at + 16));
            let end = start.checked_add(len)?;
            (kind == E820_RAM && (start..end).contains(&address)).then_some(end)
        })
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes([self.0[at], self.0[at + 1], self.0[at + 2], self.0[at + 3]])
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from(self.u32(at)) | u64::from(self.u32(at + 4)) << 32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(entries: &[(u64, u64, u32)]) -> [u8; LEN] {
        let mut page = [0; LEN];
        page[E820_ENTRIES] = entries.len() as u8;
        for (i, (start, len, kind)) in entries.iter().enumerate() {
            let at = E820_TABLE + i * E820_ENTRY_LEN;
            page[at..at + 8].copy_from_slice(&start.to_le_bytes());
            page[at + 8..at + 16].copy_from_slice(&len.to_le_bytes());
            page[at + 16..at + 20].copy_from_slice(&kind.to_le_bytes());
        }
        page
    }

    #[test]
    fn ram_end_is_of_the_ram_region_with_the_address() {
        let page =
            page(&[(0, 0x9fc00, 1), (0x9fc00, 0x400, 2), (0x10_0000, 0x700_0000, 1), (0x800_0000, 4096, 2)]);
        let params = BootParams(&page);
        assert_eq!(params.ram_end(0x10_0000), Some(0x710_0000));
        assert_eq!(params.ram_end(0x70f_ffff), Some(0x710_0000));
        assert_eq!(params.ram_end(0x710_0000), None);
        assert_eq!(params.ram_end(0x800_0000), None, "reserved");
    }

    #[test]
    fn command_line_address_joins_both_fields() {
        let mut page = page(&[]);
        page[CMD_LINE_PTR..CMD_LINE_PTR + 4].copy_from_slice(&0x2_0000u32.to_le_bytes());
        assert_eq!(BootParams(&page).command_line_address(), 0x2_0000);
        page[EXT_CMD_LINE_PTR] = 1;
        assert_eq!(BootParams(&page).command_line_address(), 0x1_0002_0000);
    }
}
