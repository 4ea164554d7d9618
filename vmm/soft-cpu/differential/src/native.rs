//! Runs cases on the host's own CPU, in a forked child.
//!
//! The child maps the [`layout`] at its fixed addresses, and every case ends with a signal. The handler, on
//! its own stack, takes the registers from the signal frame, finds the changes in memory, puts the next
//! case's registers into the frame and returns. A BPF filter turns system calls of cases into signals.
//!
//! After `fork` the child touches neither the heap nor thread-local storage: FS belongs to the cases.
#![allow(unsafe_code)]

use std::io;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use libc::{c_int, c_void, siginfo_t, ucontext_t};
use thiserror::Error;

use crate::layout::{self, DATA, PAGE, WORDS};
use crate::state::{CODE_MAX, CaseEnd, CaseOutcome, CaseStart, FX_LEN, Fx, PLANTED_MAX, Planted};

/// Cases in a batch.
pub const BATCH: usize = 512;
/// Changed words of memory that all cases of one child together may report.
const CHANGES: usize = 1 << 18;
/// Period of the timer, in CPU time: a case is given up if it is still running after one to two periods.
const TICK_US: i64 = 50_000;
/// In XSTATE_BV: x87 and SSE state.
const XSTATE_X87_SSE: u64 = 3;
/// Offset of XSTATE_BV from the start of an XSAVE area.
const XSTATE_BV: usize = 512;
/// `FP_XSTATE_MAGIC1`, at offset 464 of a signal frame's FXSAVE image: the image is an XSAVE area.
const XSTATE_MAGIC: u32 = 0x4650_5853;

/// A case, for the child.
#[derive(Clone, Copy)]
#[repr(C)]
struct NativeInput {
    gpr: [u64; 16],
    rip: u64,
    rflags: u64,
    fx: [u8; FX_LEN],
    code: [u8; CODE_MAX],
    code_len: usize,
    planted: [(u64, u64, [u8; 16]); PLANTED_MAX],
    planted_len: usize,
}

/// The outcome of a case, from the child.
#[derive(Clone, Copy)]
#[repr(C)]
struct NativeOutput {
    gpr: [u64; 16],
    rip: u64,
    rflags: u64,
    fx: [u8; FX_LEN],
    signal: i32,
    vector: u64,
    error: u64,
    cr2: u64,
    first_change: usize,
    changes: usize,
}

/// The memory that parent and child share.
#[repr(C)]
struct SharedBatch {
    count: usize,
    /// Cases that have an output.
    done: usize,
    /// Entries of `changes` in use.
    changed: usize,
    inputs: [NativeInput; BATCH],
    outputs: [NativeOutput; BATCH],
    changes: [(u32, u64); CHANGES],
}

/// The child's own variables; the handler finds them through [`CHILD`].
struct Child {
    shared: *mut SharedBatch,
    background: *const u64,
    /// The writable mapping of the code pages.
    code: *mut u8,
    /// Whether a case is running.
    running: bool,
    /// `done` at the last tick of the timer.
    ticked: usize,
}

static CHILD: AtomicPtr<Child> = AtomicPtr::new(ptr::null_mut());

/// Why the outcomes of a batch are missing.
#[derive(Debug, Error)]
pub enum NativeError {
    /// The host refused a system call.
    #[error("cannot run cases on the host's CPU: {0}")]
    Host(#[from] io::Error),
    /// The child died: an error in the harness. Exit codes below 20 are those of its `require` calls.
    #[error("the native child ended with wait status {status:#x} at case {case} of its batch")]
    Died {
        /// Index in the batch.
        case: usize,
        /// As `waitpid` gave it.
        status: c_int,
    },
}

/// Runs batches of cases natively, each batch in children of its own.
pub struct NativeCpu {
    shared: *mut SharedBatch,
    background: Vec<u64>,
}

/// A batch that is running.
pub struct Batch<'a> {
    native: &'a mut NativeCpu,
    child: libc::pid_t,
    outcomes: Vec<CaseOutcome>,
    count: usize,
}

impl NativeCpu {
    /// Sets up the memory shared with children.
    pub fn new() -> io::Result<NativeCpu> {
        // SAFETY: a new anonymous mapping; all-zero bytes are a valid `SharedBatch`.
        let at = unsafe {
            libc::mmap(
                ptr::null_mut(),
                size_of::<SharedBatch>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(NativeCpu { shared: at.cast(), background: layout::background() })
    }

    /// Starts running `starts`, at most [`BATCH`].
    pub fn start<'a>(
        &mut self,
        starts: impl ExactSizeIterator<Item = &'a CaseStart>,
    ) -> io::Result<Batch<'_>> {
        let count = starts.len();
        assert!(count <= BATCH, "{count} cases are more than a batch");
        // SAFETY: no child runs, so nothing else uses the memory.
        let shared = unsafe { &mut *self.shared };
        shared.count = count;
        shared.done = 0;
        for (input, start) in shared.inputs.iter_mut().zip(starts) {
            fill(input, start);
        }
        let child = self.fork()?;
        Ok(Batch { native: self, child, outcomes: Vec::with_capacity(count), count })
    }

    fn fork(&mut self) -> io::Result<libc::pid_t> {
        // SAFETY: no child runs.
        unsafe { (*self.shared).changed = 0 };
        // SAFETY: the child calls nothing but async-signal-safe functions, then `_exit`s.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            // SAFETY: as above; `child` is called once, in a process of its own.
            0 => unsafe { child(self.shared, &self.background) },
            pid => Ok(pid),
        }
    }
}

impl Drop for NativeCpu {
    fn drop(&mut self) {
        // SAFETY: made by `new` with this size; no `Batch` borrows it any more.
        unsafe { libc::munmap(self.shared.cast(), size_of::<SharedBatch>()) };
    }
}

impl Batch<'_> {
    /// Waits for the batch; returns the outcomes in the order of the cases.
    pub fn finish(mut self) -> Result<Vec<CaseOutcome>, NativeError> {
        loop {
            let mut status = 0;
            let child = std::mem::replace(&mut self.child, 0);
            // SAFETY: `child` is a child of this process that nobody else waits for.
            if unsafe { libc::waitpid(child, &mut status, 0) } < 0 {
                return Err(io::Error::last_os_error().into());
            }
            // SAFETY: the child has ended.
            let shared = unsafe { &*self.native.shared };
            if status != 0 {
                return Err(NativeError::Died { case: shared.done, status });
            }
            for output in &shared.outputs[self.outcomes.len()..shared.done] {
                self.outcomes.push(outcome(output, shared));
            }
            if self.outcomes.len() == self.count {
                return Ok(std::mem::take(&mut self.outcomes));
            }
            // The child had no more room for changes of memory: another one continues.
            self.child = self.native.fork()?;
        }
    }
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        if self.child > 0 {
            // SAFETY: it is our child and has not been waited for.
            unsafe {
                libc::kill(self.child, libc::SIGKILL);
                libc::waitpid(self.child, ptr::null_mut(), 0);
            }
        }
    }
}

fn fill(input: &mut NativeInput, start: &CaseStart) {
    input.gpr = start.gpr;
    input.rip = start.rip;
    input.rflags = start.rflags;
    input.fx = start.fx.to_image();
    input.code[..start.code.len()].copy_from_slice(&start.code);
    input.code_len = start.code.len();
    for (slot, Planted { at, len, bytes }) in input.planted.iter_mut().zip(&start.planted) {
        *slot = (*at, *len as u64, *bytes);
    }
    input.planted_len = start.planted.len();
}

fn outcome(o: &NativeOutput, shared: &SharedBatch) -> CaseOutcome {
    let end = match o.signal {
        libc::SIGSYS => CaseEnd::SystemCall,
        libc::SIGPROF => CaseEnd::Never,
        _ => {
            let vector = o.vector as u8;
            let error = if matches!(vector, 8 | 10..=14 | 17) { o.error as u32 } else { 0 };
            CaseEnd::Exception { vector, error, cr2: o.cr2 }
        }
    };
    CaseOutcome {
        gpr: o.gpr,
        rip: o.rip,
        rflags: o.rflags,
        fx: Fx::from_image(&o.fx),
        end,
        memory: shared.changes[o.first_change..o.first_change + o.changes].to_vec(),
    }
}

/// Ends the child at once, without any cleanup.
fn exit(code: i32) -> ! {
    // SAFETY: a system call that does not return.
    unsafe {
        std::arch::asm!("syscall", in("rax") libc::SYS_exit_group, in("rdi") code, options(noreturn, nostack))
    }
}

fn require(ok: bool, code: i32) {
    if !ok {
        exit(code);
    }
}

/// The child's main function: sets up its address space, and lets the signal handler run the cases.
///
/// # Safety
/// Must be called in a process of its own.
unsafe fn child(shared: *mut SharedBatch, background: &[u64]) -> ! {
    // SAFETY: plain system calls; the mappings are at addresses where nothing else is, as NOREPLACE checks.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        let code = map_code();
        map_data(background);
        let mut state =
            Child { shared, background: background.as_ptr(), code, running: false, ticked: usize::MAX };
        CHILD.store(&mut state, Ordering::Relaxed);
        catch_signals();
        let tick = libc::timeval { tv_sec: 0, tv_usec: TICK_US };
        libc::setitimer(
            libc::ITIMER_PROF,
            &libc::itimerval { it_interval: tick, it_value: tick },
            ptr::null_mut(),
        );
        filter_system_calls();
        require(libc::syscall(libc::SYS_arch_prctl, 0x1001 /* ARCH_SET_GS */, layout::GS_BASE) == 0, 10);
        require(libc::syscall(libc::SYS_arch_prctl, 0x1002 /* ARCH_SET_FS */, layout::FS_BASE) == 0, 11);
        std::arch::asm!("int3");
    }
    exit(12)
}

unsafe fn map(at: u64, len: u64, prot: c_int, fd: c_int) -> *mut u8 {
    let kind = if fd < 0 { libc::MAP_PRIVATE | libc::MAP_ANONYMOUS } else { libc::MAP_SHARED };
    let fixed = if at != 0 { libc::MAP_FIXED_NOREPLACE } else { 0 };
    // SAFETY: replaces no mapping.
    let p = unsafe {
        libc::mmap(at as *mut c_void, len as usize, prot, kind | fixed | libc::MAP_POPULATE, fd, 0)
    };
    require(p != libc::MAP_FAILED && (at == 0 || p as u64 == at), 2);
    p.cast()
}

/// Maps the code pages readable and executable, and a second time writable; returns the second mapping.
unsafe fn map_code() -> *mut u8 {
    // SAFETY: system calls, and writes to the mapping just made.
    unsafe {
        let fd = libc::memfd_create(c"code".as_ptr(), 0);
        require(fd >= 0 && libc::ftruncate(fd, layout::CODE_LEN as i64) == 0, 3);
        let writable = map(0, layout::CODE_LEN, libc::PROT_READ | libc::PROT_WRITE, fd);
        ptr::write_bytes(writable, 0xcc, layout::CODE_LEN as usize);
        map(layout::CODE, layout::CODE_LEN, libc::PROT_READ | libc::PROT_EXEC, fd);
        writable
    }
}

unsafe fn map_data(background: &[u64]) {
    for (page, words) in DATA.iter().zip(background.chunks(512)) {
        // SAFETY: writes to the page just mapped.
        unsafe {
            let at = map(page.at, PAGE, libc::PROT_READ | libc::PROT_WRITE, -1);
            ptr::copy_nonoverlapping(words.as_ptr(), at.cast(), 512);
            if !page.writable {
                require(libc::mprotect(at.cast(), PAGE as usize, libc::PROT_READ) == 0, 4);
            }
        }
    }
}

unsafe fn catch_signals() {
    const STACK: u64 = 1 << 18;
    // SAFETY: system calls; the stack is mapped and stays.
    unsafe {
        let stack = map(0, STACK, libc::PROT_READ | libc::PROT_WRITE, -1);
        let stack = libc::stack_t { ss_sp: stack.cast(), ss_flags: 0, ss_size: STACK as usize };
        require(libc::sigaltstack(&stack, ptr::null_mut()) == 0, 5);
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = entry as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigfillset(&mut action.sa_mask);
        for signal in [
            libc::SIGSEGV,
            libc::SIGBUS,
            libc::SIGILL,
            libc::SIGFPE,
            libc::SIGTRAP,
            libc::SIGSYS,
            libc::SIGPROF,
        ] {
            require(libc::sigaction(signal, &action, ptr::null_mut()) == 0, 6);
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        require(libc::sigprocmask(libc::SIG_SETMASK, &none, ptr::null_mut()) == 0, 7);
    }
}

/// Makes system calls from below 4 GiB, where only cases run, and 32-bit ones raise SIGSYS.
unsafe fn filter_system_calls() {
    const LOAD: u16 = 0x20;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    const ARCH_X86_64: u32 = 0xc000_003e;
    // Offsets in `struct seccomp_data`: arch at 4, the upper half of the instruction pointer at 12.
    let mut program = [
        libc::sock_filter { code: LOAD, jt: 0, jf: 0, k: 4 },
        libc::sock_filter { code: JUMP_IF_EQUAL, jt: 0, jf: 2, k: ARCH_X86_64 },
        libc::sock_filter { code: LOAD, jt: 0, jf: 0, k: 12 },
        libc::sock_filter { code: JUMP_IF_EQUAL, jt: 0, jf: 1, k: 0 },
        libc::sock_filter { code: RETURN, jt: 0, jf: 0, k: libc::SECCOMP_RET_TRAP },
        libc::sock_filter { code: RETURN, jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW },
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the filter outlives the call that copies it.
    unsafe {
        require(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, 8);
        require(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &filter) == 0, 9);
    }
}

/// The entry of the signal handler: clears AC, NT and ID of the case, which would disturb compiled code and
/// the next case.
#[unsafe(naked)]
extern "C" fn entry() {
    std::arch::naked_asm!("pushfq", "and dword ptr [rsp], {keep}", "popfq", "jmp {handler}",
        keep = const !(1u32 << 21 | 1 << 18 | 1 << 14) as i32, handler = sym handler)
}

/// The signal handler: ends the running case and starts the next.
unsafe extern "C" fn handler(signal: c_int, _: *mut siginfo_t, context: *mut ucontext_t) {
    // SAFETY: the function `child` has set it in this process, which has one thread.
    let child = unsafe { &mut *CHILD.load(Ordering::Relaxed) };
    // SAFETY: the parent reads it only after this process has ended.
    let shared = unsafe { &mut *child.shared };
    // SAFETY: the kernel passes a valid context.
    let context = unsafe { &mut *context };
    if signal == libc::SIGPROF && child.ticked != shared.done {
        child.ticked = shared.done;
        return;
    }
    if child.running {
        // SAFETY: the frame is the kernel's, and the pages are mapped.
        unsafe { take_outcome(child, shared, signal, context) };
        shared.done += 1;
    }
    child.running = true;
    if shared.done == shared.count || shared.changed + WORDS > CHANGES {
        exit(0);
    }
    // SAFETY: as above.
    unsafe { load(child, &shared.inputs[shared.done], context) };
}

/// The indexes of RAX to R15 in `gregs`.
const GREGS: [c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

unsafe fn take_outcome(child: &Child, shared: &mut SharedBatch, signal: c_int, context: &ucontext_t) {
    let output = &mut shared.outputs[shared.done];
    let gregs = &context.uc_mcontext.gregs;
    for (v, r) in output.gpr.iter_mut().zip(GREGS) {
        *v = gregs[r as usize] as u64;
    }
    output.rip = gregs[libc::REG_RIP as usize] as u64;
    output.rflags = gregs[libc::REG_EFL as usize] as u64;
    output.vector = gregs[libc::REG_TRAPNO as usize] as u64;
    output.error = gregs[libc::REG_ERR as usize] as u64;
    output.cr2 = gregs[libc::REG_CR2 as usize] as u64;
    output.signal = signal;
    // SAFETY: the frame has an FXSAVE image.
    unsafe { ptr::copy_nonoverlapping(context.uc_mcontext.fpregs.cast(), output.fx.as_mut_ptr(), FX_LEN) };

    let input = &shared.inputs[shared.done];
    // SAFETY: the input's code was written there.
    unsafe { ptr::write_bytes(child.code.add((input.rip - layout::CODE) as usize), 0xcc, input.code_len) };
    output.first_change = shared.changed;
    for (number, page) in DATA.iter().enumerate().filter(|(_, p)| p.writable) {
        // SAFETY: the page is mapped and writable, and the background has as many pages.
        let (now, was) = unsafe {
            let was = std::slice::from_raw_parts(child.background.add(number * 512), 512);
            (std::slice::from_raw_parts_mut(page.at as *mut u64, 512), was)
        };
        if now == was {
            continue;
        }
        for (word, (now, was)) in now.iter_mut().zip(was).enumerate() {
            if now != was {
                shared.changes[shared.changed] = ((number * 512 + word) as u32, *now);
                shared.changed += 1;
                *now = *was;
            }
        }
    }
    output.changes = shared.changed - output.first_change;
}

unsafe fn load(child: &Child, input: &NativeInput, context: &mut ucontext_t) {
    // SAFETY: code lies within the code pages, planted values within writable ones, as `CaseStart` promises.
    unsafe {
        let code = child.code.add((input.rip - layout::CODE) as usize);
        ptr::copy_nonoverlapping(input.code.as_ptr(), code, input.code_len);
        for (at, len, bytes) in &input.planted[..input.planted_len] {
            ptr::copy_nonoverlapping(bytes.as_ptr(), *at as *mut u8, *len as usize);
        }
    }
    let gregs = &mut context.uc_mcontext.gregs;
    for (v, r) in input.gpr.iter().zip(GREGS) {
        gregs[r as usize] = *v as i64;
    }
    gregs[libc::REG_RIP as usize] = input.rip as i64;
    gregs[libc::REG_EFL as usize] = input.rflags as i64;
    let frame: *mut u8 = context.uc_mcontext.fpregs.cast();
    // MXCSR_MASK, 4 bytes, stays the host's.
    const MXCSR_MASK: usize = 28;
    // SAFETY: an FXSAVE image, followed by an XSAVE header if the magic number is there.
    unsafe {
        ptr::copy_nonoverlapping(input.fx.as_ptr(), frame, MXCSR_MASK);
        let rest = MXCSR_MASK + 4;
        ptr::copy_nonoverlapping(input.fx.as_ptr().add(rest), frame.add(rest), FX_LEN - rest);
        if frame.add(464).cast::<u32>().read_unaligned() == XSTATE_MAGIC {
            let present = frame.add(XSTATE_BV).cast::<u64>();
            present.write_unaligned(present.read_unaligned() | XSTATE_X87_SSE);
        }
    }
}
