//! New connections to proxy virtual servers go to the listener of the CPU they arrive on.

use aya_ebpf::{
    bindings::sk_action::{SK_DROP, SK_PASS},
    helpers,
    programs::SkLookupContext,
};
use lb_common::{
    access::Arrival, addr::Addr, flow::FlowKey, layout::MAX_WORKERS, reason::DropReason,
    service::Service,
};

use crate::{
    Tables,
    access::{self, Knock},
    maps::{self, LISTENERS},
    service,
};

const AF_INET6: u32 = 10;
const IPPROTO_TCP: u32 = 6;

/// Chooses the socket of a new connection; the program's return code.
///
/// A passthrough virtual server has no socket: what reaches the stack there belongs to no flow, and refusing the lookup
/// makes the stack answer with RST, whatever else listens on the box.
#[inline(always)]
#[expect(unsafe_code, reason = "context fields and helper calls")]
pub fn steer<T: Tables>(context: &SkLookupContext, tables: &T) -> u32 {
    let lookup = context.lookup;
    // Volatile, one by one: loads merged by family would go through a chosen pointer, which counts as a modified context
    // and may not be read.
    // SAFETY: fields of the running program's context; the verifier lets it read these.
    let (protocol, family, four, six, port) = unsafe {
        (
            (&raw const (*lookup).protocol).read_volatile(),
            (&raw const (*lookup).family).read_volatile(),
            (&raw const (*lookup).local_ip4).read_volatile(),
            [
                (&raw const (*lookup).local_ip6[0]).read_volatile(),
                (&raw const (*lookup).local_ip6[1]).read_volatile(),
                (&raw const (*lookup).local_ip6[2]).read_volatile(),
                (&raw const (*lookup).local_ip6[3]).read_volatile(),
            ],
            (&raw const (*lookup).local_port).read_volatile(),
        )
    };
    if protocol != IPPROTO_TCP {
        return SK_PASS;
    }
    let v6 = family == AF_INET6;
    let address = if v6 { Addr(six) } else { Addr::v4(four) };
    let Some(config) = tables.config() else {
        return SK_PASS;
    };
    let port = (port as u16).to_be();
    let Some(service) = service::find(tables, config, &address, port) else {
        return SK_PASS;
    };
    if service.forward == Service::GONE {
        return SK_PASS;
    }
    if service.forward != Service::PROXY && service.forward != Service::PROXY_AFTER {
        return SK_DROP;
    }
    if let Some(guard) = access::guard(tables, config, service.virtual_server)
        && let src = source(context, v6)
        && judges(context, &src, &address)
    {
        let key = FlowKey {
            src,
            dst: address,
            sport: sport(context),
            dport: port,
        };
        let knock = Knock {
            key,
            arrival: Arrival {
                source: key.src,
                interface: interface(context),
                vlan: 0,
            },
            virtual_server: service.virtual_server,
        };
        let reason = match access::judge(tables, guard, &knock) {
            access::ACCEPTED => None,
            access::LIMITED => Some(DropReason::RateLimited),
            action => Some(access::reason(action as u8)),
        };
        if let Some(reason) = reason {
            maps::count_drop(reason);
            return SK_DROP;
        }
    }
    // SAFETY: helper call without arguments.
    let cpu = unsafe { helpers::generated::bpf_get_smp_processor_id() };
    let base = if v6 { MAX_WORKERS } else { 0 };
    let own = base + cpu.checked_rem(config.workers).unwrap_or(0);
    if LISTENERS.redirect_sk_lookup(context, own, 0).is_ok()
        || LISTENERS.redirect_sk_lookup(context, base, 0).is_ok()
    {
        return SK_PASS;
    }
    maps::count_drop(DropReason::NoWorker);
    SK_DROP
}

/// Set before the object is loaded: may the program ask by which interface a connection comes in (Linux 5.17)?
#[unsafe(no_mangle)]
#[expect(unsafe_code, reason = "a tunable is an exported symbol")]
static STEER_JUDGES: u32 = 0;

/// Index of loopback, in every network namespace (net/net_namespace.h).
const LOOPBACK: u32 = 1;

/// Has nobody judged this connection yet? On an interface with a packet program, that one has.
///
/// A connection from the box itself seems to come in by the interface that has the virtual address, but its source is that
/// address too, or one of loopback. From outside the kernel takes neither (RFC 1122 §3.2.1.3).
#[inline(always)]
#[expect(unsafe_code, reason = "a tunable")]
fn judges(context: &SkLookupContext, source: &Addr, destination: &Addr) -> bool {
    if source == destination || is_loopback(source) {
        return maps::is_unjudged(LOOPBACK);
    }
    // SAFETY: the loader writes it once, before the program runs; volatile, so that the value here is not assumed.
    let able = unsafe { core::ptr::read_volatile(&raw const STEER_JUDGES) } != 0;
    able && maps::is_unjudged(interface(context))
}

/// 127.0.0.0/8 and ::1.
#[inline(always)]
fn is_loopback(address: &Addr) -> bool {
    let words = &address.0;
    match address.is_v4() {
        true => u32::from_be(words[3]) >> 24 == 127,
        false => words[0] | words[1] | words[2] == 0 && words[3] == 1u32.to_be(),
    }
}

#[inline(always)]
#[expect(unsafe_code, reason = "context fields")]
fn interface(context: &SkLookupContext) -> u32 {
    // SAFETY: a field of the running program's context; only read where the kernel has it.
    unsafe { (&raw const (*context.lookup).ingress_ifindex).read_volatile() }
}

#[inline(always)]
#[expect(unsafe_code, reason = "context fields")]
fn source(context: &SkLookupContext, v6: bool) -> Addr {
    let lookup = context.lookup;
    // SAFETY: fields of the running program's context; the verifier lets it read these. Volatile as above.
    let (four, six) = unsafe {
        (
            (&raw const (*lookup).remote_ip4).read_volatile(),
            [
                (&raw const (*lookup).remote_ip6[0]).read_volatile(),
                (&raw const (*lookup).remote_ip6[1]).read_volatile(),
                (&raw const (*lookup).remote_ip6[2]).read_volatile(),
                (&raw const (*lookup).remote_ip6[3]).read_volatile(),
            ],
        )
    };
    if v6 { Addr(six) } else { Addr::v4(four) }
}

/// The client's port, network order.
#[inline(always)]
#[expect(unsafe_code, reason = "context fields")]
fn sport(context: &SkLookupContext) -> u16 {
    // SAFETY: a field of the running program's context.
    unsafe { (&raw const (*context.lookup).remote_port).read_volatile() }
}
