//! Loads and stores by linear address.
//!
//! A hit in the fast TLB is a compare and a copy. Everything else (TLB misses, accesses that cross pages, the
//! first write to a page, stores near decoded code, devices) takes the slow path, which is exact: a store
//! that crosses pages checks both before it writes to either, so that an access that faults has written
//! nothing.

use crate::exit::{CpuExit, CpuStop};
use crate::flags::Flags;
use crate::insn::{Insn, flag};
use crate::int::Int;
use crate::paging::{Access, is_canonical};
use crate::state::{Cpu, WATCHED, seg};

const PAGE: usize = 4096;

/// Where the bytes at a linear address are.
#[derive(Clone, Copy)]
enum PageBacking {
    /// At this offset in RAM.
    Ram(usize),
    /// At this guest-physical address outside RAM.
    Device(u64),
}

impl Cpu {
    /// Reads an integer at linear address `addr`.
    #[inline(always)]
    pub fn load<T: Int>(&mut self, ram: &mut [u8], addr: u64) -> Result<T, CpuStop> {
        match self.load_quick(ram, addr) {
            Some(v) => Ok(v),
            None => self.load_slow::<T>(ram, addr),
        }
    }

    /// Writes an integer at linear address `addr`.
    #[inline(always)]
    pub fn store<T: Int>(&mut self, ram: &mut [u8], addr: u64, value: T) -> Result<(), CpuStop> {
        match self.store_quick(ram, addr, value) {
            Some(()) => Ok(()),
            None => self.store_slow::<T>(ram, addr, value),
        }
    }

    /// [`Cpu::load`] if the fast TLB has the page and the page has all of the integer; otherwise `None`.
    #[inline(always)]
    pub(crate) fn load_quick<T: Int>(&self, ram: &[u8], addr: u64) -> Option<T> {
        let e = self.fast.get(self.mode, addr >> 12);
        // This compares the page of the last byte: if the integer crosses into the next page, the entry
        // cannot have it.
        if e.read != addr.wrapping_add(T::SIZE as u64 - 1) >> 12 {
            return None;
        }
        T::read(ram.get(e.ram + (addr as usize & (PAGE - 1))..)?)
    }

    /// [`Cpu::store`] under the same conditions.
    #[inline(always)]
    pub(crate) fn store_quick<T: Int>(&mut self, ram: &mut [u8], addr: u64, value: T) -> Option<()> {
        let e = self.fast.get(self.mode, addr >> 12);
        if e.write != addr.wrapping_add(T::SIZE as u64 - 1) >> 12 {
            return None;
        }
        value.write(ram.get_mut(e.ram + (addr as usize & (PAGE - 1))..)?)
    }

    /// [`Cpu::modify`] under the same conditions.
    #[inline(always)]
    pub(crate) fn modify_quick<T: Int>(
        &mut self,
        ram: &mut [u8],
        addr: u64,
        f: impl FnOnce(&mut Cpu, T) -> (T, Flags),
    ) -> Option<()> {
        let (place, old) = self.writable_quick(ram, addr)?;
        let (new, flags) = f(self, old);
        new.write(place)?;
        self.flags = flags;
        Some(())
    }

    /// The memory at `addr`, if the fast TLB allows a write of an integer there, and its old value.
    #[inline(always)]
    fn writable_quick<'a, T: Int>(&self, ram: &'a mut [u8], addr: u64) -> Option<(&'a mut [u8], T)> {
        let e = self.fast.get(self.mode, addr >> 12);
        if e.write != addr.wrapping_add(T::SIZE as u64 - 1) >> 12 {
            return None;
        }
        let place = ram.get_mut(e.ram + (addr as usize & (PAGE - 1))..)?;
        let old = T::read(place)?;
        Some((place, old))
    }

    /// Reads 16 bytes, at any alignment.
    #[inline(always)]
    pub fn load_u128(&mut self, ram: &mut [u8], addr: u64) -> Result<u128, CpuStop> {
        let e = self.fast.get(self.mode, addr >> 12);
        let within = addr as usize & (PAGE - 1);
        if e.read == addr >> 12
            && within <= PAGE - 16
            && let Some(b) = ram.get(e.ram + within..).and_then(|r| r.first_chunk())
        {
            return Ok(u128::from_le_bytes(*b));
        }
        let mut b = [0; 16];
        self.load_bytes(ram, addr, &mut b)?;
        Ok(u128::from_le_bytes(b))
    }

    /// Writes 16 bytes, at any alignment.
    #[inline(always)]
    pub fn store_u128(&mut self, ram: &mut [u8], addr: u64, value: u128) -> Result<(), CpuStop> {
        let e = self.fast.get(self.mode, addr >> 12);
        let within = addr as usize & (PAGE - 1);
        if e.write == addr >> 12
            && within <= PAGE - 16
            && let Some(b) = ram.get_mut(e.ram + within..).and_then(|r| r.first_chunk_mut())
        {
            *b = value.to_le_bytes();
            return Ok(());
        }
        self.store_bytes(ram, addr, &value.to_le_bytes())
    }

    /// Reads the instruction's memory operand.
    #[inline(always)]
    pub fn load_operand<T: Int>(&mut self, ram: &mut [u8], i: &Insn) -> Result<T, CpuStop> {
        let addr = self.ea(i);
        match self.load(ram, addr) {
            Ok(v) => Ok(v),
            Err(stop) => Err(self.operand_fault(i, stop)),
        }
    }

    /// Writes the instruction's memory operand.
    #[inline(always)]
    pub fn store_operand<T: Int>(&mut self, ram: &mut [u8], i: &Insn, value: T) -> Result<(), CpuStop> {
        let addr = self.ea(i);
        match self.store(ram, addr, value) {
            Ok(()) => Ok(()),
            Err(stop) => Err(self.operand_fault(i, stop)),
        }
    }

    /// Replaces the memory operand by the value that `f` returns for it and, when the write has succeeded,
    /// the flags by those that `f` returns. A page that may be read but not written faults as for a write, as
    /// on hardware.
    #[inline(always)]
    pub fn modify_operand<T: Int>(
        &mut self,
        ram: &mut [u8],
        i: &Insn,
        f: impl FnOnce(&mut Cpu, T) -> (T, Flags),
    ) -> Result<(), CpuStop> {
        let addr = self.ea(i);
        match self.modify(ram, addr, f) {
            Ok(()) => Ok(()),
            Err(stop) => Err(self.operand_fault(i, stop)),
        }
    }

    /// As [`Cpu::modify_operand`], at linear address `addr`.
    #[inline(always)]
    pub fn modify<T: Int>(
        &mut self,
        ram: &mut [u8],
        addr: u64,
        f: impl FnOnce(&mut Cpu, T) -> (T, Flags),
    ) -> Result<(), CpuStop> {
        let Some((place, old)) = self.writable_quick::<T>(ram, addr) else {
            return self.modify_slow(ram, addr, f);
        };
        let (new, flags) = f(self, old);
        new.write(place);
        self.flags = flags;
        Ok(())
    }

    #[cold]
    #[inline(never)]
    fn modify_slow<T: Int>(
        &mut self,
        ram: &mut [u8],
        addr: u64,
        f: impl FnOnce(&mut Cpu, T) -> (T, Flags),
    ) -> Result<(), CpuStop> {
        self.check_alignment(addr, T::SIZE)?;
        self.probe_write(ram, addr, T::SIZE)?;
        let old = self.load(ram, addr)?;
        let (new, flags) = f(self, old);
        self.store(ram, addr, new)?;
        self.flags = flags;
        Ok(())
    }

    /// Adapts the stop of an access to the memory operand: in the stack segment #GP becomes #SS.
    #[cold]
    pub(crate) fn operand_fault(&mut self, i: &Insn, stop: CpuStop) -> CpuStop {
        if i.flags & flag::STACK != 0 { self.stack_fault(stop) } else { stop }
    }

    #[cold]
    #[inline(never)]
    fn load_slow<T: Int>(&mut self, ram: &mut [u8], addr: u64) -> Result<T, CpuStop> {
        let mut b = [0; 8];
        self.load_bytes(ram, addr, &mut b[..T::SIZE])?;
        Ok(T::from_u64(u64::from_le_bytes(b)))
    }

    #[cold]
    #[inline(never)]
    fn store_slow<T: Int>(&mut self, ram: &mut [u8], addr: u64, value: T) -> Result<(), CpuStop> {
        self.store_bytes(ram, addr, &value.to_u64().to_le_bytes()[..T::SIZE])
    }

    /// Reads up to a page of bytes with the rights of the current privilege level.
    pub fn load_bytes(&mut self, ram: &mut [u8], addr: u64, out: &mut [u8]) -> Result<(), CpuStop> {
        self.check_alignment(addr, out.len())?;
        let user = self.user();
        self.read_linear(ram, addr, out, user)
    }

    /// Writes up to a page of bytes with the rights of the current privilege level.
    pub fn store_bytes(&mut self, ram: &mut [u8], addr: u64, bytes: &[u8]) -> Result<(), CpuStop> {
        self.check_alignment(addr, bytes.len())?;
        let user = self.user();
        self.write_linear(ram, addr, bytes, user)
    }

    /// Reads with supervisor rights, as the CPU itself does for descriptor tables, task state and stack
    /// frames.
    pub fn load_system<T: Int>(&mut self, ram: &mut [u8], addr: u64) -> Result<T, CpuStop> {
        let mut b = [0; 8];
        self.read_linear(ram, addr, &mut b[..T::SIZE], false)?;
        Ok(T::from_u64(u64::from_le_bytes(b)))
    }

    /// Writes with supervisor rights.
    pub fn store_system<T: Int>(&mut self, ram: &mut [u8], addr: u64, value: T) -> Result<(), CpuStop> {
        self.write_linear(ram, addr, &value.to_u64().to_le_bytes()[..T::SIZE], false)
    }

    /// Raises #AC if `addr` is not a multiple of the operand's size (of 8, for 80-bit numbers), in user mode
    /// with CR0.AM and RFLAGS.AC set.
    pub(crate) fn check_alignment(&mut self, addr: u64, len: usize) -> Result<(), CpuStop> {
        let align = match len {
            2 | 4 | 8 => len as u64,
            10 => 8,
            _ => return Ok(()),
        };
        if addr & (align - 1) != 0 && self.checks_alignment() {
            self.check_canonical(addr, 1)?;
            return self.raise(17, Some(0));
        }
        Ok(())
    }

    /// Checks that a byte at `addr` could be read now.
    pub fn probe_read(&mut self, ram: &mut [u8], addr: u64) -> Result<(), CpuStop> {
        let user = self.user();
        self.check_canonical(addr, 1)?;
        self.locate(ram, addr, Access::Read, user).map(|_| ())
    }

    /// Checks that `len` bytes (at most a page) at `addr` could be written now, and changes nothing except
    /// the TLB and accessed and dirty bits: for instructions with several stores, none of which may be done
    /// if one faults.
    pub fn probe_write(&mut self, ram: &mut [u8], addr: u64, len: usize) -> Result<(), CpuStop> {
        let user = self.user();
        self.check_canonical(addr, len)?;
        self.locate(ram, addr, Access::Write, user)?;
        let last = addr.wrapping_add(len as u64 - 1);
        if last >> 12 != addr >> 12 {
            self.locate(ram, last & !(PAGE as u64 - 1), Access::Write, user)?;
        }
        Ok(())
    }

    /// For `REP` string instructions that handle many elements at once: the RAM offset of `addr`, if the fast
    /// TLB allows the access to its page. For writes the page is then also marked as written and has no
    /// decoded code.
    pub(crate) fn run_offset(&mut self, addr: u64, access: Access) -> Option<usize> {
        let e = self.fast.get(self.mode, addr >> 12);
        let tag = if access == Access::Write { e.write } else { e.read };
        (tag == addr >> 12).then(|| e.ram + (addr as usize & (PAGE - 1)))
    }

    fn read_linear(&mut self, ram: &mut [u8], addr: u64, out: &mut [u8], user: bool) -> Result<(), CpuStop> {
        self.note_breakpoints(addr, out.len(), Access::Read);
        self.check_canonical(addr, out.len())?;
        let first = (PAGE - (addr as usize & (PAGE - 1))).min(out.len());
        let place = self.locate(ram, addr, Access::Read, user)?;
        let (a, b) = out.split_at_mut(first);
        if b.is_empty() {
            return self.read_at(ram, place, a);
        }
        let next = self.locate(ram, addr.wrapping_add(first as u64), Access::Read, user)?;
        self.read_at(ram, place, a)?;
        self.read_at(ram, next, b)
    }

    fn write_linear(&mut self, ram: &mut [u8], addr: u64, bytes: &[u8], user: bool) -> Result<(), CpuStop> {
        self.note_breakpoints(addr, bytes.len(), Access::Write);
        self.check_canonical(addr, bytes.len())?;
        let first = (PAGE - (addr as usize & (PAGE - 1))).min(bytes.len());
        let place = self.locate(ram, addr, Access::Write, user)?;
        let (a, b) = bytes.split_at(first);
        if b.is_empty() {
            return self.write_at(ram, place, a);
        }
        let next = self.locate(ram, addr.wrapping_add(first as u64), Access::Write, user)?;
        // Neither half may be written if the other makes the instruction run again.
        self.check_code(place, a.len())?;
        self.check_code(next, b.len())?;
        self.write_at(ram, place, a)?;
        self.write_at(ram, next, b)
    }

    /// All bytes of an access have to be canonical; this is checked before any page is translated.
    #[inline(always)]
    fn check_canonical(&mut self, addr: u64, len: usize) -> Result<(), CpuStop> {
        let last = addr.wrapping_add(len as u64 - 1);
        if is_canonical(addr) && is_canonical(last) { Ok(()) } else { self.general_protection(0) }
    }

    /// Translates a canonical address.
    fn locate(
        &mut self,
        ram: &mut [u8],
        addr: u64,
        access: Access,
        user: bool,
    ) -> Result<PageBacking, CpuStop> {
        let entry = self.translate(ram, addr, access, user)?;
        let frame = entry.frame & 0x000f_ffff_ffff_f000;
        let within = addr as usize & (PAGE - 1);
        let Some(offset) = self.ram_offset(frame) else {
            return Ok(PageBacking::Device(frame + within as u64));
        };
        if self.mode & WATCHED == 0 {
            self.fill_fast_tlb(addr >> 12, offset, access, user);
        }
        Ok(PageBacking::Ram(offset + within))
    }

    /// Adds a page to the fast TLB, so that the next access to it takes the fast path.
    fn fill_fast_tlb(&mut self, page: u64, ram: usize, access: Access, user: bool) {
        let plain = self.code_chunks.get(ram / PAGE) == Some(&0);
        if access == Access::Write {
            self.mark_written(ram);
        }
        self.fast.fill(user, page, ram, access == Access::Write && plain);
    }

    /// Reads from RAM or a device.
    fn read_at(&mut self, ram: &[u8], place: PageBacking, out: &mut [u8]) -> Result<(), CpuStop> {
        match place {
            PageBacking::Ram(at) => match ram.get(at..at + out.len()) {
                Some(b) => out.copy_from_slice(b),
                None => out.fill(0xff),
            },
            PageBacking::Device(addr) => {
                let size = device_size(out.len());
                for (n, piece) in out.chunks_mut(size).enumerate() {
                    let addr = addr + (n * size) as u64;
                    let v = self.ask(CpuExit::MmioRead { addr, size: size as u8 })?;
                    piece.copy_from_slice(&v.to_le_bytes()[..size]);
                }
            }
        }
        Ok(())
    }

    /// Writes to RAM or a device.
    fn write_at(&mut self, ram: &mut [u8], place: PageBacking, bytes: &[u8]) -> Result<(), CpuStop> {
        match place {
            PageBacking::Ram(at) => self.write_ram(ram, at, bytes)?,
            PageBacking::Device(addr) => {
                let size = device_size(bytes.len());
                for (n, piece) in bytes.chunks(size).enumerate() {
                    let addr = addr + (n * size) as u64;
                    let mut v = [0; 8];
                    v[..size].copy_from_slice(piece);
                    self.ask(CpuExit::MmioWrite { addr, size: size as u8, value: u64::from_le_bytes(v) })?;
                }
            }
        }
        Ok(())
    }

    /// Stops the instruction with a question or, if it runs again with the answer, returns that.
    pub(crate) fn ask(&mut self, question: CpuExit) -> Result<u64, CpuStop> {
        let r = &mut self.io_replies;
        if r.used < r.values.len() {
            r.used += 1;
            return Ok(r.values[r.used - 1]);
        }
        self.io = question;
        Err(CpuStop::Io)
    }

    /// Writes bytes within one page of RAM.
    pub(crate) fn write_ram(&mut self, ram: &mut [u8], at: usize, bytes: &[u8]) -> Result<(), CpuStop> {
        self.check_code(PageBacking::Ram(at), bytes.len())?;
        if let Some(b) = ram.get_mut(at..at + bytes.len()) {
            b.copy_from_slice(bytes);
            self.mark_written(at);
        }
        Ok(())
    }

    /// To be called before a write. If it touches decoded code, notes its page; and unless such writes are
    /// allowed now, stops the instruction, which runs again when the code is dropped.
    fn check_code(&mut self, place: PageBacking, len: usize) -> Result<(), CpuStop> {
        match place {
            PageBacking::Ram(at) if self.hits_code(at, len) => {
                self.code_written.push((at / PAGE) as u32);
                if self.code_write_allowed { Ok(()) } else { Err(CpuStop::CodeWrite) }
            }
            _ => Ok(()),
        }
    }

    /// Do `len` bytes at RAM offset `at`, all in one page, touch decoded code?
    fn hits_code(&self, at: usize, len: usize) -> bool {
        let first = at % PAGE / 64;
        let last = (at % PAGE + len.max(1) - 1) / 64;
        let mask = (u64::MAX >> (63 - (last - first).min(63))) << first;
        self.code_chunks.get(at / PAGE).is_some_and(|chunks| chunks & mask != 0)
    }

    /// Marks the page at RAM offset `at` as written.
    #[inline]
    pub(crate) fn mark_written(&mut self, at: usize) {
        let page = at / PAGE;
        let word = &mut self.written[page / 64];
        if *word & 1 << (page % 64) == 0 {
            *word |= 1 << (page % 64);
            self.written_list.push(page as u32);
        }
    }

    /// Passes `page` the number of each page of RAM written since the last call, in the order of their first
    /// writes.
    pub fn take_written(&mut self, mut page: impl FnMut(u32)) {
        for p in self.written_list.drain(..) {
            self.written[p as usize / 64] = 0;
            page(p);
        }
        self.fast.forget_writes();
    }

    /// Turns the #GP of an access to the stack segment into #SS.
    pub(crate) fn stack_fault(&mut self, stop: CpuStop) -> CpuStop {
        if stop == CpuStop::Fault && self.exception.vector == 13 {
            self.exception.vector = 12;
        }
        stop
    }

    /// Sets the privilege level, which is the DPL of SS.
    pub(crate) fn set_cpl(&mut self, cpl: u8) {
        let attr = &mut self.sys.seg[seg::SS].attr;
        *attr = *attr & !0x60 | (cpl as u16) << 5;
        self.cpl_changed();
    }
}

/// Size of the single accesses that a device access of `len` bytes is split into: `len` if it is a size that
/// the bus supports, 8 if it is a multiple of that, else 1.
fn device_size(len: usize) -> usize {
    match len {
        1 | 2 | 4 | 8 => len,
        _ if len.is_multiple_of(8) => 8,
        _ => 1,
    }
}
