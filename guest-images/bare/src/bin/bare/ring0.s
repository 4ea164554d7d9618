# Everything that runs in ring 0: entry, interrupt and exception stubs, and the three system calls.
#
# Only instructions that KVM's instruction emulator knows are used here, because a nested PVM host emulates ring 0:
# no SSE, INT3, CMPXCHG16B, XSAVE, CPUID or far return.

.set KERNEL_CODE, 0x08
.set USER_CODE,   0x13
.set USER_DATA,   0x1b
.set TASK,        0x20
.set CR0_VALUE,   0x80010033            # PG WP NE ET MP PE: SSE and x87 usable, no task-switched trap
.set CR4_VALUE,   0x620                 # PAE OSFXSR OSXMMEXCPT; SMEP and SMAP off, since every page is a user page
.set FLAG_INTERRUPTS, 0x200
.set CALL_IDLE, 0
.set CALL_INTERRUPTS_ON, 1
.set GENERAL_PROTECTION, 13
.set EXCEPTIONS, 32
.set VECTORS, 48                        # exceptions and 16 interrupt lines
.set STUB_BYTES, 32
.set FLAGS_USER,  0x2                   # interrupts off until ring 3 has set up the PIC; IOPL is 0, since PVM loses it

# ---- entry: 64-bit Linux boot protocol, RSI = boot_params ----
.section .text.ring0, "ax"
.global entry
entry:
    cli
    cld
    mov esp, offset ring0_stack_top
    mov eax, offset page_map_level4
    mov cr3, rax
    mov eax, CR4_VALUE
    mov cr4, rax
    mov eax, CR0_VALUE
    mov cr0, rax

    mov eax, offset task_state          # the descriptor's base is in three pieces, which the linker cannot fill in
    mov word ptr [global_descriptors + TASK + 2], ax
    shr eax, 16
    mov byte ptr [global_descriptors + TASK + 4], al
    mov byte ptr [global_descriptors + TASK + 7], ah
    lgdt [gdt_pointer]
    xor eax, eax
    mov ds, eax
    mov es, eax
    mov fs, eax
    mov gs, eax
    mov eax, TASK
    ltr ax

    mov eax, offset stubs               # interrupt gates; the table's constant parts are in the image
    mov edi, offset interrupt_descriptors
    mov ecx, VECTORS
1:  mov word ptr [rdi], ax
    mov edx, eax
    shr edx, 16
    mov word ptr [rdi + 6], dx
    add eax, STUB_BYTES
    add edi, 16
    dec ecx
    jnz 1b
    lidt [idt_pointer]

    mov rdi, rsi
    push USER_DATA
    push offset ring3_stack_top - 8     # as if called: RSP + 8 is a multiple of 16
    push FLAGS_USER
    push USER_CODE
    push offset ring3_entry
    iretq

# ---- ring 3's first instructions: clear .bss, keep boot_params in RDI for `main` ----
ring3_entry:
    mov rdx, rdi
    mov edi, offset bss_start
    mov ecx, offset bss_end
    sub ecx, edi
    xor eax, eax
    shr ecx, 3
    rep stosq
    mov rdi, rdx
    jmp main

# ---- stubs, one for each vector, STUB_BYTES apart ----
.macro exception vector, has_code
    .balign STUB_BYTES
    .if \vector == GENERAL_PROTECTION
    cmp qword ptr [rsp + 8], offset system_call_fault
    je ring3_asks
    .endif
    .if \has_code == 0
    push 0
    .endif
    push \vector
    jmp exception_common
.endm

.macro irq line
    .balign STUB_BYTES
    .if \line == 0
    push rax
    inc qword ptr [TICKS]
    or dword ptr [PENDING], 1
    mov al, 0x20                        # end of interrupt; ring 3 sends those of devices when it has served them
    out 0x20, al
    pop rax
    .else
    or dword ptr [PENDING], 1 << \line
    .endif
    iretq
.endm

.balign STUB_BYTES
stubs:
.altmacro
.set vector, 0
.rept EXCEPTIONS
    .if (vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17) || (vector == 21) || (vector == 29) || (vector == 30)
    exception %vector, 1
    .else
    exception %vector, 0
    .endif
    .set vector, vector + 1
.endr
.set line, 0
.rept 16
    irq %line
    .set line, line + 1
.endr
.noaltmacro

# ---- system calls: ring 3 executes HLT in `system_call`, which faults, with the call's number in EDI ----
# (A nested PVM host can neither enter a gate by INT n from ring 3 nor leave ring 3 by SYSCALL.)
.global system_call
system_call:
    cmp edi, CALL_IDLE                  # no flag in the frame is one that a CPU may choose
system_call_fault:
    hlt
    ret

ring3_asks:
    add rsp, 8                          # the error code
    inc qword ptr [rsp]                 # past the HLT
    cmp edi, CALL_IDLE
    je idle
    cmp edi, CALL_INTERRUPTS_ON
    jne crash
    or dword ptr [rsp + 16], FLAG_INTERRUPTS
    iretq

# Sleep until an interrupt line in ESI is pending. Checked with interrupts off, and STI takes effect after HLT has begun,
# so that no interrupt falls between check and sleep.
idle:
    test dword ptr [PENDING], esi
    jnz 1f
    sti
    hlt
    cli
    jmp idle
1:  iretq

# Triple fault.
crash:
    lidt [no_idt]
    ud2

# Frame: vector, error code, RIP, CS, RFLAGS, RSP, SS. The report is written in ring 3; a fault in there crashes at once.
exception_common:
    cmp byte ptr [fault_seen], 0
    jne crash
    mov byte ptr [fault_seen], 1
    pop rdi
    pop rsi
    mov rdx, qword ptr [rsp]
    mov rcx, cr2
    mov r8, qword ptr [rsp + 24]
    mov qword ptr [rsp], offset exception_report
    mov qword ptr [rsp + 8], USER_CODE
    mov qword ptr [rsp + 16], FLAGS_USER
    mov qword ptr [rsp + 24], offset ring3_stack_top - 8
    mov qword ptr [rsp + 32], USER_DATA
    iretq

# ---- tables; every accessed, dirty and busy bit that the CPU would set is set already, ltr's busy bit excepted ----
.section .data.page_tables, "aw"
.balign 4096
page_map_level4:
    .quad page_directory_pointers + 0x67    # present, writable, user, accessed, dirty
    .zero 4096 - 8
page_directory_pointers:                    # the first 4 GiB, identity-mapped
    .quad page_directories + 0x67
    .quad page_directories + 0x1067
    .quad page_directories + 0x2067
    .quad page_directories + 0x3067
    .zero 4096 - 32
page_directories:
.set address, 0
.rept 2048
    .quad address + 0xe7                    # the same, 2 MiB page
    .set address, address + 0x200000
.endr

.section .data, "aw"
.balign 16
global_descriptors:
    .quad 0
    .quad 0x00af9b000000ffff                # ring 0 code
    .quad 0x00affb000000ffff                # ring 3 code
    .quad 0x00cff3000000ffff                # ring 3 data
    .word task_state_end - task_state - 1, 0
    .byte 0, 0x89, 0, 0
    .quad 0
gdt_pointer:
    .word gdt_pointer - global_descriptors - 1
    .quad global_descriptors

.balign 16
interrupt_descriptors:
.rept VECTORS
    .word 0, KERNEL_CODE, 0x8e00, 0         # interrupt gate
    .quad 0
.endr
idt_pointer:
    .word idt_pointer - interrupt_descriptors - 1
    .quad interrupt_descriptors
no_idt:
    .word 0
    .quad 0

.balign 16
    .zero 12                                # so that RSP0 is aligned
task_state:
    .long 0
    .quad ring0_stack_top
    .zero 90
    .word io_bitmap - task_state
io_bitmap:                                  # ports 0 to 0x7ff are open to ring 3
    .zero 0x100
    .byte 0xff
task_state_end:

fault_seen:
    .byte 0

.section .noinit, "aw", @nobits
.balign 16
    .zero 4096
ring0_stack_top:
    .zero 262144
ring3_stack_top:
