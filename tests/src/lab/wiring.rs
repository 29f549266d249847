//! Namespaces, wires and addresses of each topology.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    process::Command,
};

use anyhow::Result;

use super::{Host, Lab, Links, Plan, Topology, namespace::Namespace, pass::Pass};

/// The virtual addresses, in the clients' network.
pub const VIRTUAL: (Ipv4Addr, Ipv6Addr) = (
    Ipv4Addr::new(10, 71, 0, 100),
    Ipv6Addr::new(0xfd71, 0, 0, 0, 0, 0, 0, 0x100),
);

const CLIENTS: usize = 2;
const MEMBERS: usize = 3;

/// A network: 10.N.0.0/24 and fdN::/64.
#[derive(Clone, Copy)]
struct Net(u8);

impl Net {
    fn v4(self, host: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, self.0, 0, host)
    }

    fn v6(self, host: u8) -> Ipv6Addr {
        // The same digits in both families are easier on the eye: 10.71.0.11 and fd71::11.
        let digits = |number: u8| u16::from_str_radix(&number.to_string(), 16).unwrap_or_default();
        Ipv6Addr::new(0xfd00 | digits(self.0), 0, 0, 0, 0, 0, 0, digits(host))
    }

    /// Lines that give an interface its addresses of this network; no duplicate detection, so they work at once.
    fn addresses(self, interface: &str, host: u8) -> [String; 2] {
        [
            format!("address add {}/24 dev {interface}", self.v4(host)),
            format!("address add {}/64 dev {interface} nodad", self.v6(host)),
        ]
    }

    fn prefixes(self) -> [String; 2] {
        [format!("{}/24", self.v4(0)), format!("{}/64", self.v6(0))]
    }
}

const CLIENT_NET: Net = Net(71);
const SERVER_NET: Net = Net(72);
const REMOTE_NET: Net = Net(73);
/// Host numbers; clients count from 11, members from 21.
const BOX: u8 = 1;
const ROUTER: u8 = 2;
const FIRST_CLIENT: u8 = 11;
const FIRST_MEMBER: u8 = 21;

pub(super) const fn interfaces(topology: Topology) -> (&'static str, &'static str) {
    match topology {
        Topology::TwoArm | Topology::Routed => ("cli0", "srv0"),
        Topology::OneArm => ("lan0", "lan0"),
    }
}

pub(super) fn build(prefix: String, folder: PathBuf, plan: Plan) -> Result<Lab> {
    let site = Site {
        prefix: &prefix,
        plan,
    };
    let balancer = site.machine("box")?;
    let client_side = site.switch("sw-c")?;
    let (client_interface, server_interface) = interfaces(plan.topology);
    site.plug(
        &balancer,
        client_interface,
        &client_side,
        "box",
        CLIENT_NET,
        BOX,
    )?;

    let mut switches = Vec::new();
    let (member_switch, member_net, gateway) = match plan.topology {
        Topology::OneArm => (None, CLIENT_NET, BOX),
        Topology::TwoArm => {
            let side = site.switch("sw-m")?;
            site.plug(&balancer, server_interface, &side, "box", SERVER_NET, BOX)?;
            (Some(side), SERVER_NET, BOX)
        }
        Topology::Routed => {
            let near = site.switch("sw-s")?;
            site.plug(&balancer, server_interface, &near, "box", SERVER_NET, BOX)?;
            let far = site.switch("sw-m")?;
            switches.push(site.router(&balancer, &near, &far)?);
            switches.push(near);
            (Some(far), REMOTE_NET, ROUTER)
        }
    };
    let member_side = member_switch.as_ref().unwrap_or(&client_side);

    let clients = (0..CLIENTS)
        .map(|at| site.host(&client_side, 'c', at, CLIENT_NET, FIRST_CLIENT, BOX))
        .collect::<Result<_>>()?;
    let members = (0..MEMBERS)
        .map(|at| site.host(member_side, 'm', at, member_net, FIRST_MEMBER, gateway))
        .collect::<Result<_>>()?;

    switches.push(client_side);
    switches.extend(member_switch);
    let mut passes = Vec::new();
    if plan.links == Links::ForXdp {
        // Every switch port towards the box is called `box`.
        for switch in switches.iter().filter(|switch| has_link(switch, "box")) {
            passes.push(Pass::attach(switch, "box")?);
        }
    }
    Ok(Lab {
        prefix,
        folder,
        keep: false,
        plan,
        clients,
        members,
        balancer,
        _passes: passes,
        switches,
    })
}

pub(super) fn has_link(namespace: &Namespace, name: &str) -> bool {
    namespace
        .run(Command::new("ip").args(["link", "show", "dev", name]))
        .is_ok()
}

struct Site<'a> {
    prefix: &'a str,
    plan: Plan,
}

impl Site<'_> {
    fn machine(&self, name: &str) -> Result<Namespace> {
        let namespace = Namespace::create(&format!("{}-{name}", self.prefix))?;
        // Addresses work at once, and no router is waited for.
        for family in ["all", "default"] {
            namespace.sysctl(&format!("net/ipv6/conf/{family}/accept_dad"), "0")?;
            namespace.sysctl(&format!("net/ipv6/conf/{family}/router_solicitations"), "0")?;
        }
        Ok(namespace)
    }

    fn switch(&self, name: &str) -> Result<Namespace> {
        let switch = self.machine(name)?;
        switch.ip(&[
            "link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0".to_owned(),
            "link set br0 up".to_owned(),
        ])?;
        Ok(switch)
    }

    /// A wire from an interface of a machine to a port of a switch, and the machine's addresses on it.
    fn plug(
        &self,
        machine: &Namespace,
        interface: &str,
        switch: &Namespace,
        port: &str,
        net: Net,
        host: u8,
    ) -> Result<()> {
        switch.ip(&[
            format!(
                "link add {port} type veth peer name {interface} netns {}",
                machine.name()
            ),
            format!("link set {port} master br0 up"),
        ])?;
        let [v4, v6] = net.addresses(interface, host);
        machine.ip(&[v4, v6, format!("link set {interface} up")])?;
        if self.plan.links == Links::ForXdp {
            // XDP loses the note that a checksum is still to be computed. Without checksums there is no
            // segmentation offload either, so no frame is larger than its link, which XDP could not redirect.
            offload(machine, interface, &["tx", "off"])?;
        }
        Ok(())
    }

    fn host(
        &self,
        switch: &Namespace,
        kind: char,
        at: usize,
        net: Net,
        first: u8,
        gateway: u8,
    ) -> Result<Host> {
        let name = format!("{kind}{}", at + 1);
        let namespace = self.machine(&name)?;
        let number = first + u8::try_from(at)?;
        self.plug(&namespace, "eth0", switch, &name, net, number)?;
        namespace.ip(&[
            format!("route add default via {}", net.v4(gateway)),
            format!("route add default via {}", net.v6(gateway)),
        ])?;
        Ok(Host {
            name,
            namespace,
            v4: net.v4(number),
            v6: net.v6(number),
        })
    }

    /// A plain router between the box's server network and the members'.
    fn router(&self, balancer: &Namespace, near: &Namespace, far: &Namespace) -> Result<Namespace> {
        let router = self.machine("router")?;
        router.sysctl("net/ipv4/ip_forward", "1")?;
        router.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        self.plug(&router, "near", near, "router", SERVER_NET, ROUTER)?;
        self.plug(&router, "far", far, "router", REMOTE_NET, ROUTER)?;
        let [remote4, remote6] = REMOTE_NET.prefixes();
        balancer.ip(&[
            format!("route add {remote4} via {}", SERVER_NET.v4(ROUTER)),
            format!("route add {remote6} via {}", SERVER_NET.v6(ROUTER)),
        ])?;
        router.ip(&[
            format!("route add default via {}", SERVER_NET.v4(BOX)),
            format!("route add default via {}", SERVER_NET.v6(BOX)),
        ])?;
        Ok(router)
    }
}

fn offload(machine: &Namespace, interface: &str, setting: &[&str]) -> Result<()> {
    machine.run(
        Command::new("ethtool")
            .arg("-K")
            .arg(interface)
            .args(setting),
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_families_show_the_same_digits() {
        assert_eq!(CLIENT_NET.v4(11).to_string(), "10.71.0.11");
        assert_eq!(CLIENT_NET.v6(11).to_string(), "fd71::11");
        assert_eq!(CLIENT_NET.v4(100), VIRTUAL.0);
        assert_eq!(CLIENT_NET.v6(100), VIRTUAL.1);
    }
}
