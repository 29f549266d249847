//! Members that are sent the clients' packets and whose answers do not come back over this box.

use super::{Finding, Level};
use crate::{
    admin::view::{MemberView, Status},
    model::{Forward, Generation, Snat},
};

/// Fewer packets or sessions than this may be answered in a moment.
const ENOUGH: u64 = 8;

/// With `snat = "none"`, members that are up, were sent clients, and never answered one over this box.
pub(super) fn members(generation: &Generation, status: &Status) -> Vec<Finding> {
    let keeps_clients = |pool: &str, by_proxy: bool| {
        let mut servers = generation.virtual_servers.iter();
        servers.any(|server| {
            let (snat, proxy) = match &server.forward {
                Forward::Passthrough { snat, .. } => (snat, false),
                Forward::Proxy { terms, .. } => (&terms.snat, true),
            };
            *snat == Snat::None && proxy == by_proxy && &*server.pool == pool
        })
    };
    let up = |member: &&MemberView| member.state != "down";
    let mut findings = Vec::new();
    for pool in &status.pools {
        let passes = keeps_clients(&pool.name, false);
        let proxies = keeps_clients(&pool.name, true);
        for member in pool.members.iter().filter(up) {
            let (kernel, proxy) = (&member.kernel, &member.proxy);
            if passes && kernel.packets_in >= ENOUGH && kernel.packets_out == 0 {
                let packets = kernel.packets_in;
                let found = format!(
                    "{packets} packets of clients went there, and none came back over this box"
                );
                findings.push(finding(member, found));
            }
            if proxies && proxy.total >= ENOUGH && proxy.bytes_out == 0 {
                let sessions = proxy.total;
                let found = format!("{sessions} sessions were to be its, and it answered in none");
                findings.push(finding(member, found));
            }
        }
    }
    findings
}

fn finding(member: &MemberView, found: String) -> Finding {
    Finding::new(
        &format!("member {}/{}", member.pool, member.name),
        Level::Warning,
        found,
        "With snat = \"none\" its way to the clients has to lead over this box: correct its routes, or set snat = \"automap\".",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::{Source as _, sample::FakeSource, view::Traffic};

    #[test]
    fn a_member_that_answers_past_the_box_is_named() {
        let text = |snat: &str| {
            format!(
                "[network]\nclient_interfaces = [\"a\"]\nserver_interfaces = [\"b\"]\n\
                 [virtual_server.s]\naddress = \"203.0.113.1\"\nport = 465\nforward = \"passthrough\"\n\
                 pool = \"p\"\nsnat = \"{snat}\"\n\
                 [[pool.p.member]]\nname = \"m\"\naddress = \"10.0.0.9\"\nport = 465\n"
            )
        };
        let generation = |snat: &str| crate::config::parse("f", &text(snat)).unwrap().0;
        let mut status = FakeSource.status();
        let pool = &mut status.pools[0];
        pool.name = "p".to_owned();
        pool.members.truncate(1);
        let mut found = |snat: &str, state: &str, packets_in, packets_out| {
            let member = &mut status.pools[0].members[0];
            (member.pool, member.name) = ("p".to_owned(), "m".to_owned());
            member.state = state.to_owned();
            member.kernel = Traffic {
                packets_in,
                packets_out,
                ..Traffic::default()
            };
            members(&generation(snat), &status)
        };
        let named = found("none", "up", 30, 0);
        assert_eq!(named.len(), 1);
        assert_eq!(named[0].check, "member p/m");
        assert!(
            named[0]
                .found
                .starts_with("30 packets of clients went there")
        );
        assert_eq!(found("none", "up", 30, 1), []);
        assert_eq!(found("none", "up", 3, 0), [], "it may answer still");
        assert_eq!(found("none", "down", 30, 0), [], "it answers nobody");
        assert_eq!(found("automap", "up", 30, 0), []);
    }

    #[test]
    fn a_member_that_never_greets_the_proxy_is_named() {
        let text = "[network]\nclient_interfaces = [\"a\"]\nserver_interfaces = [\"b\"]\n\
             [virtual_server.s]\naddress = \"203.0.113.1\"\nport = 25\nforward = \"proxy\"\npool = \"p\"\n\
             snat = \"none\"\n[[pool.p.member]]\nname = \"m\"\naddress = \"10.0.0.9\"\nport = 25\n";
        let generation = crate::config::parse("f", text).unwrap().0;
        let mut status = FakeSource.status();
        let mut found = |total, bytes_out| {
            let pool = &mut status.pools[0];
            pool.name = "p".to_owned();
            pool.members.truncate(1);
            pool.members[0].state = "up".to_owned();
            pool.members[0].proxy = Traffic {
                total,
                bytes_out,
                ..Traffic::default()
            };
            members(&generation, &status).len()
        };
        assert_eq!((found(8, 0), found(7, 0), found(8, 1)), (1, 0, 0));
    }
}
