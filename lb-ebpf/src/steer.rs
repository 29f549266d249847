//! New connections to proxy virtual servers go to the listener of the CPU they arrive on.

use aya_ebpf::{
    bindings::sk_action::{SK_DROP, SK_PASS},
    helpers,
    programs::SkLookupContext,
};
use lb_common::{addr::Addr, layout::MAX_WORKERS, reason::DropReason, service::Service};

use crate::{
    Tables,
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
    let Some(service) = service::find(tables, config, &address, (port as u16).to_be()) else {
        return SK_PASS;
    };
    if service.forward == Service::GONE {
        return SK_PASS;
    }
    if service.forward != Service::PROXY && service.forward != Service::PROXY_AFTER {
        return SK_DROP;
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
