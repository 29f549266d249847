//! The programs: each turns a verdict into the return code of its hook.
#![no_std]
#![no_main]
#![expect(
    unsafe_code,
    reason = "program sections and tunables are exported symbols"
)]

use aya_ebpf::{
    EbpfContext,
    bindings::{
        TC_ACT_OK, TC_ACT_SHOT, TC_ACT_UNSPEC,
        xdp_action::{XDP_DROP, XDP_PASS},
    },
    macros::{classifier, sk_lookup, xdp},
    programs::{SkLookupContext, TcContext, XdpContext},
};
use aya_log_ebpf::info;
use lb_common::reason::DropReason;
use lb_ebpf::{
    Verdict, balance,
    frame::{TcFrame, XdpFrame, tc, xdp},
    maps::{self, KernelTables},
    steer, sweep,
};

/// Set before the object is loaded; 0 makes the verifier remove every log line.
#[unsafe(no_mangle)]
static KERNEL_LOG: u32 = 0;

/// Ingress of an interface, after the driver: keeps GSO, resolves neighbours.
#[classifier]
fn balance_tc(context: TcContext) -> i32 {
    match balance(&mut TcFrame::new(&context), &KernelTables) {
        Ok(Verdict::Pass) => TC_ACT_UNSPEC,
        Ok(Verdict::Send(egress)) => tc::send(&egress),
        Err(reason) if refused(&context, reason) => TC_ACT_UNSPEC,
        Err(_) => TC_ACT_SHOT,
    }
}

/// Ingress of an interface, in its driver.
#[xdp(frags)]
fn balance_xdp(context: XdpContext) -> u32 {
    xdp_verdict::<false>(&context)
}

/// Ingress of an interface, behind a driver without XDP. Without `frags`, which breaks TC behind it (Linux 6.18).
#[xdp]
fn balance_xdp_generic(context: XdpContext) -> u32 {
    xdp_verdict::<true>(&context)
}

/// The socket of a new connection.
#[sk_lookup]
fn steer_sessions(context: SkLookupContext) -> u32 {
    steer::steer(&context, &KernelTables)
}

/// Releases expired flows; the daemon runs it, no packet does.
#[classifier]
fn sweep_flows(_: TcContext) -> i32 {
    sweep(&KernelTables);
    TC_ACT_OK
}

/// Passes everything: a veth hands redirected frames on only when its peer has an XDP program.
#[xdp]
fn pass(_: XdpContext) -> u32 {
    XDP_PASS
}

#[inline(always)]
fn xdp_verdict<const GENERIC: bool>(context: &XdpContext) -> u32 {
    match balance(&mut XdpFrame::<GENERIC>::new(context), &KernelTables) {
        Ok(Verdict::Pass) => XDP_PASS,
        Ok(Verdict::Send(egress)) => xdp::send(context, &egress),
        Err(reason) if refused(context, reason) => XDP_PASS,
        Err(_) => XDP_DROP,
    }
}

/// Counts and logs a packet that was not carried; true when the stack gets it.
#[inline(always)]
fn refused<C: EbpfContext>(context: &C, reason: DropReason) -> bool {
    maps::count_drop(reason);
    // SAFETY: the loader writes it once, before the program runs; volatile, so that the value here is not assumed.
    if unsafe { core::ptr::read_volatile(&raw const KERNEL_LOG) } != 0 {
        let fate = if reason.to_stack() {
            "to the stack"
        } else {
            "dropped"
        };
        info!(context, "{}: {}", fate, reason.word());
    }
    reason.to_stack()
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
