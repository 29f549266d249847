//! The TC hook before Linux 6.6: a filter of the clsact qdisc.
//!
//! Such a filter is no link and cannot be pinned, but it stays when the daemon ends. Priority and handle are fixed, so
//! that the next daemon finds it and swaps the program in place.

use anyhow::{Context, Result};
use aya::programs::{
    SchedClassifier, TcAttachType,
    links::Link as _,
    tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle, qdisc_add_clsact},
};

use crate::model::Network;

const PRIORITY: u16 = 46_500;
const HANDLE: TcHandle = TcHandle::new(0, 1);

/// Attaches the program to an interface, or swaps it in place.
///
/// # Errors
///
/// When the kernel refuses.
pub(super) fn attach(program: &mut SchedClassifier, interface: &str) -> Result<()> {
    // Already there is as good as made.
    let _ = qdisc_add_clsact(interface);
    let id = match program.attach_to_link(filter(interface)?) {
        Ok(id) => id,
        Err(_) => {
            let options = NlOptions {
                priority: PRIORITY,
                handle: HANDLE,
                ..NlOptions::default()
            };
            program
                .attach_with_options(
                    interface,
                    TcAttachType::Ingress,
                    TcAttachOptions::Netlink(options),
                )
                .context("cannot add a filter to the clsact qdisc")?
        }
    };
    // The filter has to outlive the process; dropping the link would remove it.
    std::mem::forget(program.take_link(id)?);
    Ok(())
}

/// Removes the filter from every interface where it is. The qdisc stays: others may use it.
pub(super) fn detach(network: &Network) {
    for interface in network
        .client_interfaces
        .iter()
        .chain(&network.server_interfaces)
    {
        if let Ok(link) = filter(interface) {
            // Not there is as good as removed.
            let _ = link.detach();
        }
    }
}

fn filter(interface: &str) -> Result<SchedClassifierLink> {
    Ok(SchedClassifierLink::attached(
        interface,
        TcAttachType::Ingress,
        PRIORITY,
        HANDLE,
        None,
    )?)
}
