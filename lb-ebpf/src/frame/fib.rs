//! The kernel's routing table, asked from a packet program.
#![expect(unsafe_code, reason = "helper calls")]

use aya_ebpf::{
    bindings::{
        bpf_fib_lookup, bpf_fib_lookup__bindgen_ty_1, bpf_fib_lookup__bindgen_ty_2,
        bpf_fib_lookup__bindgen_ty_3, bpf_fib_lookup__bindgen_ty_4, bpf_fib_lookup__bindgen_ty_5,
    },
    helpers,
};
use core::ffi::c_void;
use lb_common::{addr::Addr, flow::FlowKey, reason::DropReason};
use network_types::ip::IpProto;

use crate::Egress;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// `BPF_FIB_LKUP_RET_*`, linux/bpf.h.
const SUCCESS: i64 = 0;
const FORWARDING_OFF: i64 = 5;
const NO_NEIGHBOUR: i64 = 7;

/// IPv6 works on every link of this (RFC 8200 §5).
const LEAST_MTU: u32 = 1280;
/// Any length but 0 makes the kernel tell the MTU (Linux 5.12).
const ANY: u16 = 1;
/// Less cannot be an MTU (RFC 791 §3.2): the kernel is one that tells none.
const MIN_MTU: u16 = 68;

/// Asks for the way of a packet that will say `to`.
///
/// A function of its own: its question takes 64 of the 512 bytes of stack.
#[inline(never)]
pub(super) fn lookup(
    context: *mut c_void,
    interface: u32,
    to: &FlowKey,
    egress: &mut Egress,
) -> Result<(), DropReason> {
    let v6 = !to.dst.is_v4();
    // An IPv4 address is the first word; behind it nobody looks.
    let words = |address: &Addr| match v6 {
        true => address.0,
        false => [address.0[3]; 4],
    };
    let mut ask = bpf_fib_lookup {
        family: if v6 { AF_INET6 } else { AF_INET },
        l4_protocol: IpProto::Tcp as u8,
        sport: to.sport,
        dport: to.dport,
        __bindgen_anon_1: bpf_fib_lookup__bindgen_ty_1 { tot_len: ANY },
        ifindex: interface,
        __bindgen_anon_2: bpf_fib_lookup__bindgen_ty_2 { flowinfo: 0 },
        __bindgen_anon_3: bpf_fib_lookup__bindgen_ty_3 {
            ipv6_src: words(&to.src),
        },
        __bindgen_anon_4: bpf_fib_lookup__bindgen_ty_4 {
            ipv6_dst: words(&to.dst),
        },
        __bindgen_anon_5: bpf_fib_lookup__bindgen_ty_5 { tbid: 0 },
        smac: [0; 6],
        dmac: [0; 6],
    };
    // SAFETY: the context is the program's own, and the struct is as large as we say.
    let answer = unsafe {
        helpers::generated::bpf_fib_lookup(context, &mut ask, size_of::<bpf_fib_lookup>() as i32, 0)
    };
    egress.interface = ask.ifindex;
    egress.known = answer == SUCCESS;
    let ([a, b, c, d, e, f], [g, h, i, j, k, l]) = (ask.dmac, ask.smac);
    egress.macs = [[a, b, c, d], [e, f, g, h], [i, j, k, l]].map(u32::from_ne_bytes);
    // SAFETY: the kernel writes the MTU in place of the length.
    let mtu = unsafe { ask.__bindgen_anon_1.mtu_result };
    egress.mtu = if mtu < MIN_MTU {
        u32::MAX
    } else {
        u32::from(mtu)
    };
    match answer {
        SUCCESS | NO_NEIGHBOUR => Ok(()),
        FORWARDING_OFF => Err(DropReason::ForwardingOff),
        _ => Err(DropReason::NoRoute),
    }
}

/// The MTU of an interface, bytes (Linux 5.12); without the helper, what every link takes.
#[inline(always)]
pub(super) fn link_mtu(context: *mut c_void, interface: u32) -> u32 {
    let mut mtu = 0;
    // SAFETY: the context is the program's own, and the answer is a number on the stack.
    let answer = unsafe { helpers::generated::bpf_check_mtu(context, interface, &mut mtu, 0, 0) };
    if answer < 0 { LEAST_MTU } else { mtu }
}
