//! Members that are sent the clients' packets and whose answers do not come back over this box.

use super::{Finding, Level};
use crate::{
    admin::view::{MemberView, Status},
    model::{Forward, Generation, Snat},
};

/// Fewer packets than this may be answered in a moment.
const ENOUGH: u64 = 8;

/// With `snat = "none"`, members that are up, got packets and never sent one back by this box.
pub(super) fn members(generation: &Generation, status: &Status) -> Vec<Finding> {
    let keeps_clients = |pool: &str| {
        let mut servers = generation.virtual_servers.iter();
        servers.any(|server| {
            let passes = matches!(
                server.forward,
                Forward::Passthrough {
                    snat: Snat::None,
                    ..
                }
            );
            passes && &*server.pool == pool
        })
    };
    let pools = status.pools.iter().filter(|pool| keeps_clients(&pool.name));
    pools
        .flat_map(|pool| &pool.members)
        .filter_map(finding)
        .collect()
}

fn finding(member: &MemberView) -> Option<Finding> {
    let traffic = &member.kernel;
    if member.state == "down" || traffic.packets_in < ENOUGH || traffic.packets_out > 0 {
        return None;
    }
    Some(Finding::new(
        &format!("member {}/{}", member.pool, member.name),
        Level::Warning,
        format!(
            "{} packets of clients went there, and none came back over this box",
            traffic.packets_in
        ),
        "With snat = \"none\" its way to the clients has to lead over this box: correct its routes, or set snat = \"automap\".",
    ))
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
}
