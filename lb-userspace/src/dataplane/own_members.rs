//! Members on the box itself: the kernel plane sends packets on by the routing table, and to the box that leads nowhere.

use std::{net::IpAddr, sync::Arc};

use crate::model::{Forward, Generation, Pool};

/// What forbids the members of a generation on this box, which has the addresses `own` by itself.
pub(super) fn conflicts(generation: &Generation, own: &[IpAddr]) -> Vec<String> {
    let passed = |pool: &&Arc<Pool>| {
        let mut servers = generation.virtual_servers.iter();
        servers.any(|server| {
            server.pool == pool.name && matches!(server.forward, Forward::Passthrough { .. })
        })
    };
    let mut found = Vec::new();
    for pool in generation.pools.values().filter(passed) {
        for member in &pool.members {
            if own.contains(&member.address.ip()) {
                found.push(format!(
                    "member \"{}/{}\" has {}, which is an address of the box itself\n  \
                     The kernel plane passes no packet on to the box. Write the address of the mail server itself, or set \
                     forward = \"proxy\".",
                    pool.name,
                    member.name,
                    member.address.ip()
                ));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_on_the_box_is_for_the_proxy_alone() {
        let text = r#"
            [network]
            client_interfaces = ["eth0"]
            server_interfaces = ["eth1"]
            [virtual_server.s]
            address = "203.0.113.1"
            port = 465
            forward = "passthrough"
            pool = "p"
            [pool.p]
            [[pool.p.member]]
            name = "near"
            address = "10.0.0.1"
            port = 465
            [[pool.p.member]]
            address = "10.0.0.9"
            port = 465
        "#;
        let own = ["10.0.0.1", "fd00::1"].map(|address| address.parse().unwrap());
        let found = |text: &str| conflicts(&crate::config::parse("f", text).unwrap().0, &own);
        assert_eq!(
            found(text),
            [
                "member \"p/near\" has 10.0.0.1, which is an address of the box itself\n  \
                 The kernel plane passes no packet on to the box. Write the address of the mail server itself, or set \
                 forward = \"proxy\"."
            ]
        );
        assert!(found(&text.replace("10.0.0.1\"", "10.0.0.2\"")).is_empty());
        assert!(found(&text.replace("passthrough", "proxy")).is_empty());
    }
}
