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
    Egress, Verdict,
    answer::answer,
    balance, explain,
    frame::{Reshape, TcFrame, XdpFrame, tc, xdp},
    icmp,
    maps::{self, KernelTables, TC_JUMPS, XDP_GENERIC_JUMPS, XDP_JUMPS},
    odd, open, shift, steer, sweep,
};

/// Set before the object is loaded; 0 makes the verifier remove every log line.
#[unsafe(no_mangle)]
static KERNEL_LOG: u32 = 0;

/// Ingress of an interface, after the driver: keeps GSO, resolves neighbours.
#[classifier]
fn balance_tc(context: TcContext) -> i32 {
    let mut egress = Egress::default();
    let verdict = balance(&mut TcFrame::new(&context), &KernelTables, &mut egress);
    tc_verdict(&context, verdict, &egress)
}

/// Goes on with the first packet of a connection.
#[classifier]
fn open_tc(context: TcContext) -> i32 {
    let verdict = open(&mut TcFrame::new(&context), &KernelTables);
    tc_verdict(&context, verdict, &Egress::default())
}

/// Ingress of an interface, in its driver.
#[xdp(frags)]
fn balance_xdp(context: XdpContext) -> u32 {
    let mut egress = Egress::default();
    let mut frame = XdpFrame::<false>::new(&context);
    let verdict = balance(&mut frame, &KernelTables, &mut egress);
    xdp_verdict(&context, verdict, &egress, &XDP_JUMPS)
}

/// Goes on with the first packet of a connection.
#[xdp(frags)]
fn open_xdp(context: XdpContext) -> u32 {
    let mut frame = XdpFrame::<false>::new(&context);
    let verdict = open(&mut frame, &KernelTables);
    xdp_verdict(&context, verdict, &Egress::default(), &XDP_JUMPS)
}

/// Ingress of an interface, behind a driver without XDP. Without `frags`, which breaks TC behind it (Linux 6.18).
#[xdp]
fn balance_xdp_generic(context: XdpContext) -> u32 {
    let mut egress = Egress::default();
    let mut frame = XdpFrame::<true>::new(&context);
    let verdict = balance(&mut frame, &KernelTables, &mut egress);
    xdp_verdict(&context, verdict, &egress, &XDP_GENERIC_JUMPS)
}

/// Goes on with the first packet of a connection.
#[xdp]
fn open_xdp_generic(context: XdpContext) -> u32 {
    let mut frame = XdpFrame::<true>::new(&context);
    let verdict = open(&mut frame, &KernelTables);
    xdp_verdict(&context, verdict, &Egress::default(), &XDP_GENERIC_JUMPS)
}

/// Goes on with tags, fragments and extension headers.
#[classifier]
fn odd_tc(context: TcContext) -> i32 {
    let mut egress = Egress::default();
    let verdict = odd(&mut TcFrame::new(&context), &KernelTables, &mut egress);
    tc_verdict(&context, verdict, &egress)
}

/// Goes on with tags, fragments and extension headers.
#[xdp(frags)]
fn odd_xdp(context: XdpContext) -> u32 {
    let mut egress = Egress::default();
    let mut frame = XdpFrame::<false>::new(&context);
    let verdict = odd(&mut frame, &KernelTables, &mut egress);
    xdp_verdict(&context, verdict, &egress, &XDP_JUMPS)
}

/// Goes on with tags, fragments and extension headers.
#[xdp]
fn odd_xdp_generic(context: XdpContext) -> u32 {
    let mut egress = Egress::default();
    let mut frame = XdpFrame::<true>::new(&context);
    let verdict = odd(&mut frame, &KernelTables, &mut egress);
    xdp_verdict(&context, verdict, &egress, &XDP_GENERIC_JUMPS)
}

/// Goes on with a packet of a flow whose sequence numbers are shifted.
#[classifier]
fn shift_tc(context: TcContext) -> i32 {
    let mut egress = Egress::default();
    let mut frame = TcFrame::new(&context);
    let verdict = shifted(&mut frame, &mut egress);
    tc_verdict(&context, verdict, &egress)
}

/// Goes on with a packet of a flow whose sequence numbers are shifted.
#[xdp(frags)]
fn shift_xdp(context: XdpContext) -> u32 {
    let mut egress = Egress::default();
    let mut frame = XdpFrame::<false>::new(&context);
    let verdict = shifted(&mut frame, &mut egress);
    xdp_verdict(&context, verdict, &egress, &XDP_JUMPS)
}

/// Goes on with a packet of a flow whose sequence numbers are shifted.
#[xdp]
fn shift_xdp_generic(context: XdpContext) -> u32 {
    let mut egress = Egress::default();
    let mut frame = XdpFrame::<true>::new(&context);
    let verdict = shifted(&mut frame, &mut egress);
    xdp_verdict(&context, verdict, &egress, &XDP_GENERIC_JUMPS)
}

#[inline(always)]
fn shifted<F: Reshape>(frame: &mut F, egress: &mut Egress) -> Result<Verdict, DropReason> {
    let workspace = maps::workspace().ok_or(DropReason::Internal)?;
    shift(frame, &KernelTables, workspace, egress)
}

/// Goes on with ICMP.
#[classifier]
fn icmp_tc(context: TcContext) -> i32 {
    let mut egress = Egress::default();
    let verdict = icmp(&mut TcFrame::new(&context), &KernelTables, &mut egress);
    tc_verdict(&context, verdict, &egress)
}

/// Goes on with ICMP.
#[xdp(frags)]
fn icmp_xdp(context: XdpContext) -> u32 {
    let mut egress = Egress::default();
    let mut frame = XdpFrame::<false>::new(&context);
    let verdict = icmp(&mut frame, &KernelTables, &mut egress);
    xdp_verdict(&context, verdict, &egress, &XDP_JUMPS)
}

/// Goes on with ICMP.
#[xdp]
fn icmp_xdp_generic(context: XdpContext) -> u32 {
    let mut egress = Egress::default();
    let mut frame = XdpFrame::<true>::new(&context);
    let verdict = icmp(&mut frame, &KernelTables, &mut egress);
    xdp_verdict(&context, verdict, &egress, &XDP_GENERIC_JUMPS)
}

/// Answers a packet that cannot go on.
#[classifier]
fn answer_tc(context: TcContext) -> i32 {
    let mut egress = Egress::default();
    let mut frame = TcFrame::new(&context);
    match answer(&mut frame, &KernelTables, &maps::noticed(), &mut egress) {
        Ok(Verdict::Jump(jump)) => {
            let _ = jumped(&context, &TC_JUMPS, jump);
            TC_ACT_SHOT
        }
        Ok(_) => tc::send(&egress),
        Err(_) => TC_ACT_SHOT,
    }
}

/// Answers a packet that cannot go on.
#[xdp(frags)]
fn answer_xdp(context: XdpContext) -> u32 {
    let mut egress = Egress::default();
    let mut frame = XdpFrame::<false>::new(&context);
    match answer(&mut frame, &KernelTables, &maps::noticed(), &mut egress) {
        Ok(Verdict::Jump(jump)) => {
            let _ = jumped(&context, &XDP_JUMPS, jump);
            XDP_DROP
        }
        Ok(_) => xdp::send(&context, &egress),
        Err(_) => XDP_DROP,
    }
}

/// Answers a packet that cannot go on.
#[xdp]
fn answer_xdp_generic(context: XdpContext) -> u32 {
    let mut egress = Egress::default();
    let mut frame = XdpFrame::<true>::new(&context);
    match answer(&mut frame, &KernelTables, &maps::noticed(), &mut egress) {
        Ok(Verdict::Jump(jump)) => {
            let _ = jumped(&context, &XDP_GENERIC_JUMPS, jump);
            XDP_DROP
        }
        Ok(_) => xdp::send(&context, &egress),
        Err(_) => XDP_DROP,
    }
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
/// slot and tick of the first packet of each. Returns how many it has ended.
#[classifier]
fn end_flows(context: TcContext) -> i32 {
    let word = |at: u32| context.load::<u32>(at as usize * 4).unwrap_or(0);
    let (cause, member, count) = (word(0), word(1), word(2));
    let mut ended = 0;
    for place in 0..ENDS {
        if place >= count {
            break;
        }
        let at = 3 + 2 * place;
        ended += maps::end_flow(word(at), word(at + 1), member, cause);
    }
    ended as i32
}

/// Passes everything: a veth hands redirected frames on only when its peer has an XDP program.
#[xdp]
fn pass(_: XdpContext) -> u32 {
    XDP_PASS
}

#[inline(always)]
fn tc_verdict(context: &TcContext, verdict: Result<Verdict, DropReason>, egress: &Egress) -> i32 {
    let reason = match verdict {
        Ok(Verdict::Pass) => return TC_ACT_UNSPEC,
        Ok(Verdict::Send) => return tc::send(egress),
        Ok(Verdict::Jump(jump)) => jumped(context, &TC_JUMPS, jump),
        Err(reason) => reason,
    };
    if reason.answered() && answerable(context, reason, egress) {
        let _ = jumped(context, &TC_JUMPS, Jump::Answer);
        return TC_ACT_SHOT;
    }
    match refused(context, reason) {
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
    let reason = match verdict {
        Ok(Verdict::Pass) => return XDP_PASS,
        Ok(Verdict::Send) => return xdp::send(context, egress),
        Ok(Verdict::Jump(jump)) => jumped(context, jumps, jump),
        Err(reason) => reason,
    };
    if reason.answered() && answerable(context, reason, egress) {
        let _ = jumped(context, jumps, Jump::Answer);
        return XDP_DROP;
    }
    match refused(context, reason) {
        true => XDP_PASS,
        false => XDP_DROP,
    }
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
    let _ = refused(context, reason);
    true
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
