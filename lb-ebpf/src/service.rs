//! Which virtual server an address and port belong to.

use lb_common::{
    addr::Addr,
    service::{Config, PrefixKey, Service, ServiceKey},
};

use crate::Tables;

/// The virtual server of an address and port (network order): the one with this very address, else the one with the
/// longest prefix.
#[inline(always)]
pub(crate) fn find<'a, T: Tables>(
    tables: &'a T,
    config: &Config,
    address: &Addr,
    port: u16,
) -> Option<&'a Service> {
    let epoch = config.epoch as u16;
    let key = ServiceKey {
        address: *address,
        port,
        epoch,
    };
    if let Some(service) = tables.service(&key) {
        return Some(service);
    }
    if config.prefixes == 0 {
        return None;
    }
    tables.prefix(&PrefixKey {
        epoch,
        port,
        address: *address,
    })
}
