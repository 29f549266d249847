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
    maps::ProgramArray,
    programs::{SkLookupContext, TcContext, XdpContext},
};
use aya_log_ebpf::info;
use lb_common::{
    layout::{ENDS, Jump},
    reason::DropReason,
};
use lb_ebpf::{
    Egress, Verdict, explain,
    frame::{Reshape, TcFrame, XdpFrame, tc, xdp},
    maps::{self, KernelTables, TC_JUMPS, XDP_GENERIC_JUMPS, XDP_JUMPS},
    steer, sweep,
};

/// Set before the object is loaded; 0 makes the verifier remove every log line.
#[unsafe(no_mangle)]
static KERNEL_LOG: u32 = 0;

/// What the programs of every hook do, under the names that the loader and [`Jump`] know.
mod stage {
    use super::*;

    type Outcome = Result<Verdict, DropReason>;

    #[inline(always)]
    pub(super) fn balance<F: Reshape>(frame: &mut F, egress: &mut Egress) -> Outcome {
        lb_ebpf::balance(frame, &KernelTables, egress)
    }

    #[inline(always)]
    pub(super) fn open<F: Reshape>(frame: &mut F, _: &mut Egress) -> Outcome {
        lb_ebpf::open(frame, &KernelTables).or_else(|reason| lb_ebpf::refuse(frame, reason))
    }

    #[inline(always)]
    pub(super) fn odd<F: Reshape>(frame: &mut F, egress: &mut Egress) -> Outcome {
        lb_ebpf::odd(frame, &KernelTables, egress).or_else(|reason| lb_ebpf::refuse(frame, reason))
    }

    #[inline(always)]
    pub(super) fn shift<F: Reshape>(frame: &mut F, egress: &mut Egress) -> Outcome {
        let workspace = maps::workspace().ok_or(DropReason::Internal)?;
        lb_ebpf::shift(frame, &KernelTables, workspace, egress)
    }

    #[inline(always)]
    pub(super) fn icmp<F: Reshape>(frame: &mut F, egress: &mut Egress) -> Outcome {
        lb_ebpf::icmp(frame, &KernelTables, egress)
    }

    #[inline(always)]
    pub(super) fn bake<F: Reshape>(frame: &mut F, egress: &mut Egress) -> Outcome {
        let workspace = maps::workspace().ok_or(DropReason::Internal)?;
        lb_ebpf::bake(frame, &KernelTables, workspace, egress)
            .map_err(|_| DropReason::FlowTableFull)
    }

    #[inline(always)]
    pub(super) fn redeem<F: Reshape>(frame: &mut F, _: &mut Egress) -> Outcome {
        lb_ebpf::redeem(frame, &KernelTables).or_else(|reason| lb_ebpf::refuse(frame, reason))
    }

    /// What is half an answer goes nowhere.
    #[inline(always)]
    pub(super) fn answer<F: Reshape>(frame: &mut F, egress: &mut Egress) -> Outcome {
        lb_ebpf::answer::answer(frame, &KernelTables, &maps::noticed(), egress)
            .map_err(|_| DropReason::NoAnswer)
    }
}

/// A program for each hook: TC keeps GSO and resolves neighbours; XDP in the driver; XDP behind it, which is without
/// `frags`, since they break TC behind it (Linux 6.18).
macro_rules! programs {
    ($($(#[$doc:meta])* $stage:ident: $tc:ident $xdp:ident $generic:ident;)*) => { $(
        $(#[$doc])*
        #[classifier]
        fn $tc(context: TcContext) -> i32 {
            let mut egress = Egress::default();
            let verdict = stage::$stage(&mut TcFrame::new(&context), &mut egress);
            tc_verdict(&context, verdict, &egress)
        }

        $(#[$doc])*
        #[xdp(frags)]
        fn $xdp(context: XdpContext) -> u32 {
            let mut egress = Egress::default();
            let verdict = stage::$stage(&mut XdpFrame::<false>::new(&context), &mut egress);
            xdp_verdict(&context, verdict, &egress, &XDP_JUMPS)
        }

        $(#[$doc])*
        #[xdp]
        fn $generic(context: XdpContext) -> u32 {
            let mut egress = Egress::default();
            let verdict = stage::$stage(&mut XdpFrame::<true>::new(&context), &mut egress);
            xdp_verdict(&context, verdict, &egress, &XDP_GENERIC_JUMPS)
        }
    )* };
}

programs! {
    /// Ingress of an interface.
    balance: balance_tc balance_xdp balance_xdp_generic;
    /// Goes on with the first packet of a connection.
    open: open_tc open_xdp open_xdp_generic;
    /// Goes on with tags, fragments and extension headers.
    odd: odd_tc odd_xdp odd_xdp_generic;
    /// Goes on with a packet of a flow whose sequence numbers are shifted.
    shift: shift_tc shift_xdp shift_xdp_generic;
    /// Goes on with ICMP.
    icmp: icmp_tc icmp_xdp icmp_xdp_generic;
    /// Answers the first packet of a connection with a SYN cookie.
    bake: bake_tc bake_xdp bake_xdp_generic;
    /// Goes on with a packet that may bring a SYN cookie back.
    redeem: redeem_tc redeem_xdp redeem_xdp_generic;
    /// Answers a packet that cannot go on.
    answer: answer_tc answer_xdp answer_xdp_generic;
}

/// The socket of a new connection.
#[sk_lookup]
fn steer_sessions(context: SkLookupContext) -> u32 {
    steer::steer(&context, &KernelTables)
}

/// Says what would become of a connection; the daemon runs it, no packet does.
#[classifier]
fn explain_tc(context: TcContext) -> i32 {
    explain::explain(&mut TcFrame::new(&context), &KernelTables);
    TC_ACT_OK
}

/// Releases expired flows; the daemon runs it, no packet does.
#[classifier]
fn sweep_flows(_: TcContext) -> i32 {
    sweep(&KernelTables);
    TC_ACT_OK
}

/// Ends flows; the daemon runs it, no packet does. The packet is a list of words: why, the member, how many flows, then
/// slot and tick of the first packet of each. Where the slot was it leaves 1 for a flow that it has ended, else 0.
#[classifier]
fn end_flows(context: TcContext) -> i32 {
    let word = |context: &TcContext, at: u32| context.load::<u32>(at as usize * 4).unwrap_or(0);
    let [cause, member, count] = [0, 1, 2].map(|at| word(&context, at));
    for place in 0..ENDS {
        if place >= count {
            break;
        }
        let at = 3 + 2 * place;
        let (slot, created) = (word(&context, at), word(&context, at + 1));
        let ended: u32 = maps::end_flow(slot, created, member, cause);
        let _ = context.store(at as usize * 4, &ended, 0);
    }
    0
}

/// Passes everything: a veth hands redirected frames on only when its peer has an XDP program.
#[xdp]
fn pass(_: XdpContext) -> u32 {
    XDP_PASS
}

#[inline(always)]
fn tc_verdict(context: &TcContext, verdict: Result<Verdict, DropReason>, egress: &Egress) -> i32 {
    let (reason, answered) = match verdict {
        Ok(Verdict::Pass) => return TC_ACT_UNSPEC,
        Ok(Verdict::Send) => return tc::send(egress),
        Ok(Verdict::Jump(jump)) => (jumped(context, &TC_JUMPS, jump), false),
        Ok(Verdict::Reset(reason)) => (reason, true),
        Err(reason) => (reason, reason.answered()),
    };
    if answered && answerable(context, reason, egress) {
        let _ = jumped(context, &TC_JUMPS, Jump::Answer);
        return TC_ACT_SHOT;
    }
    match refused(context, reason, reason.to_stack()) {
        true => TC_ACT_UNSPEC,
        false => TC_ACT_SHOT,
    }
}

#[inline(always)]
fn xdp_verdict(
    context: &XdpContext,
    verdict: Result<Verdict, DropReason>,
    egress: &Egress,
    jumps: &ProgramArray,
) -> u32 {
    let (reason, answered) = match verdict {
        Ok(Verdict::Pass) => return XDP_PASS,
        Ok(Verdict::Send) => return xdp::send(context, egress),
        Ok(Verdict::Jump(jump)) => (jumped(context, jumps, jump), false),
        Ok(Verdict::Reset(reason)) => (reason, true),
        Err(reason) => (reason, reason.answered()),
    };
    if answered && answerable(context, reason, egress) {
        let _ = jumped(context, jumps, Jump::Answer);
        return XDP_DROP;
    }
    // On its way to the stack it meets the TC program behind this one, which counts it.
    if reason.to_stack() {
        return XDP_PASS;
    }
    refused(context, reason, false);
    XDP_DROP
}

/// Leaves for another program; comes back with a reason only when there is none. Then the packet is dropped: the stack
/// would answer it with RST, and it is only a moment until every program is in its place.
#[inline(always)]
fn jumped<C: EbpfContext>(context: &C, jumps: &ProgramArray, jump: Jump) -> DropReason {
    // SAFETY: every program of the table is of this hook; the kernel has checked that.
    unsafe { jumps.tail_call(context, jump as u32) };
    DropReason::Internal
}

/// Counts a packet that is to be answered, and leaves the note for the program that does; false when there were too many.
#[inline(always)]
fn answerable<C: EbpfContext>(context: &C, reason: DropReason, egress: &Egress) -> bool {
    if !maps::notice(reason, egress.mtu) {
        maps::count_drop(DropReason::NoAnswer);
        return false;
    }
    !refused(context, reason, false)
}

/// Counts and logs a packet that was not carried; says again whether the stack gets it.
#[inline(always)]
fn refused<C: EbpfContext>(context: &C, reason: DropReason, to_stack: bool) -> bool {
    maps::count_drop(reason);
    // SAFETY: the loader writes it once, before the program runs; volatile, so that the value here is not assumed.
    if unsafe { core::ptr::read_volatile(&raw const KERNEL_LOG) } != 0 {
        let fate = if to_stack { "to the stack" } else { "dropped" };
        info!(context, "{}: {}", fate, reason.word());
    }
    to_stack
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
