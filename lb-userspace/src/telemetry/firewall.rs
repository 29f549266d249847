//! The firewall log: one line for each connection that a logged rule or a limit decided.

use std::{fmt, net::SocketAddr};

use jiff::Timestamp;

use crate::model::Name;

/// A connection that was judged. The first eight fields stand in every line, whatever decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirewallEvent {
    /// When.
    pub date_time: Timestamp,
    /// `accept`, `drop`, `reject`; of a staged policy `would-accept` and so on.
    pub action: &'static str,
    /// The drop reason, as in the counters; absent when it was carried.
    pub drop_reason: Option<&'static str>,
    /// The client.
    pub source: SocketAddr,
    /// The virtual address and port.
    pub destination: SocketAddr,
    /// Policy and rule; absent when a limit decided.
    pub rule: Option<(Name, Name)>,
    /// The virtual server.
    pub virtual_server: Name,
    /// Index of the interface it came in by.
    pub interface: u32,
    /// VLAN identifier; 0 without a tag.
    pub vlan: u16,
}

impl fmt::Display for FirewallEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            date_time,
            action,
            source,
            destination,
            virtual_server,
            ..
        } = self;
        write!(
            f,
            "firewall date_time={date_time:.3} action={action} drop_reason={} protocol=tcp \
             src_ip={} src_port={} dest_ip={} dest_port={}",
            self.drop_reason.unwrap_or("-"),
            source.ip(),
            source.port(),
            destination.ip(),
            destination.port(),
        )?;
        match &self.rule {
            Some((policy, rule)) => write!(f, " policy={policy} rule={rule}")?,
            None => f.write_str(" policy=- rule=-")?,
        }
        write!(
            f,
            " virtual_server={virtual_server} interface={}",
            self.interface
        )?;
        if self.vlan != 0 {
            write!(f, " vlan={}", self.vlan)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The eight fields, in order, with the seed's names.
    #[test]
    fn a_line_has_the_eight_fields() {
        let mut event = FirewallEvent {
            date_time: "2026-11-21T02:30:00.5Z".parse().unwrap(),
            action: "drop",
            drop_reason: Some("policy-drop"),
            source: "198.51.100.7:40000".parse().unwrap(),
            destination: "203.0.113.10:25".parse().unwrap(),
            rule: Some(("edge".into(), "bad-net".into())),
            virtual_server: "smtp".into(),
            interface: 3,
            vlan: 0,
        };
        assert_eq!(
            event.to_string(),
            "firewall date_time=2026-11-21T02:30:00.500Z action=drop drop_reason=policy-drop protocol=tcp \
             src_ip=198.51.100.7 src_port=40000 dest_ip=203.0.113.10 dest_port=25 policy=edge rule=bad-net \
             virtual_server=smtp interface=3"
        );
        event.source = "[2001:db8::7]:1".parse().unwrap();
        (event.rule, event.drop_reason, event.vlan) = (None, None, 10);
        let line = event.to_string();
        assert!(
            line.contains(" drop_reason=- protocol=tcp src_ip=2001:db8::7 src_port=1 "),
            "{line}"
        );
        assert!(
            line.ends_with(" policy=- rule=- virtual_server=smtp interface=3 vlan=10"),
            "{line}"
        );
    }
}
