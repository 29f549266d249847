//! The flow log: one line when a passthrough flow ends, and a bound on how many.

use std::{fmt, net::SocketAddr, time::Duration};

use super::session::Quoted;

/// A flow that is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlowEnd {
    /// The virtual server's name, or `#number` when the configuration no longer has it.
    pub virtual_server: String,
    /// The client.
    pub client: SocketAddr,
    /// The virtual address.
    pub address: SocketAddr,
    /// The member's name in its pool, `-` when the configuration no longer has it.
    pub member: String,
    /// Where the member listens.
    pub member_address: SocketAddr,
    /// What the member took for the client.
    pub snat: SocketAddr,
    /// Bytes from the client, and to it: IP packets.
    pub bytes: [u64; 2],
    /// Packets from the client, and to it.
    pub packets: [u32; 2],
    /// From the first packet to the last.
    pub duration: Duration,
    /// The phase it was in.
    pub phase: &'static str,
    /// Why it ended.
    pub reason: &'static str,
}

impl fmt::Display for FlowEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            client,
            address,
            snat,
            phase,
            reason,
            ..
        } = self;
        write!(
            f,
            "flow virtual_server={} client={client} address={address} member={}/{} snat={snat}",
            Quoted(self.virtual_server.as_bytes()),
            Quoted(self.member.as_bytes()),
            self.member_address
        )?;
        let ([bytes_in, bytes_out], [packets_in, packets_out]) = (self.bytes, self.packets);
        write!(
            f,
            " bytes_in={bytes_in} bytes_out={bytes_out} packets_in={packets_in} packets_out={packets_out}"
        )?;
        let seconds = self.duration.as_secs();
        write!(f, " duration_s={seconds} end={reason} phase={phase}")
    }
}

/// So many lines in a second, and a count of the others.
#[derive(Debug)]
pub struct Rate {
    per_second: u32,
    second: u64,
    used: u32,
    suppressed: u64,
}

impl Rate {
    /// At most this many.
    pub const fn new(per_second: u32) -> Self {
        Self {
            per_second,
            second: 0,
            used: 0,
            suppressed: 0,
        }
    }

    /// Changes the bound.
    pub fn set(&mut self, per_second: u32) {
        self.per_second = per_second;
    }

    /// May a line be written in this second? What may not is counted.
    pub fn take(&mut self, second: u64) -> bool {
        if second != self.second {
            (self.second, self.used) = (second, 0);
        }
        let free = self.used < self.per_second;
        match free {
            true => self.used += 1,
            false => self.suppressed += 1,
        }
        free
    }

    /// How many lines of seconds before this one were not written, since this was asked last.
    pub fn suppressed_before(&mut self, second: u64) -> u64 {
        match second == self.second {
            true => 0,
            false => std::mem::take(&mut self.suppressed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_it_all() {
        let end = FlowEnd {
            virtual_server: "smtps".into(),
            client: "198.51.100.7:4711".parse().unwrap(),
            address: "203.0.113.10:465".parse().unwrap(),
            member: "mx 1".into(),
            member_address: "10.0.0.11:465".parse().unwrap(),
            snat: "10.0.0.1:20001".parse().unwrap(),
            bytes: [4096, 512],
            packets: [7, 5],
            duration: Duration::from_millis(3_200),
            phase: "closing",
            reason: "closed",
        };
        assert_eq!(
            end.to_string(),
            "flow virtual_server=smtps client=198.51.100.7:4711 address=203.0.113.10:465 \
             member=\"mx 1\"/10.0.0.11:465 snat=10.0.0.1:20001 bytes_in=4096 bytes_out=512 packets_in=7 packets_out=5 \
             duration_s=3 end=closed phase=closing"
        );
    }

    #[test]
    fn a_second_takes_so_many_and_counts_the_others() {
        let mut rate = Rate::new(2);
        let taken: Vec<_> = (0..4).map(|_| rate.take(7)).collect();
        assert_eq!(taken, [true, true, false, false]);
        assert_eq!(rate.suppressed_before(7), 0, "the second is not over");
        assert_eq!(rate.suppressed_before(8), 2);
        assert_eq!(rate.suppressed_before(8), 0, "said once");
        assert!(rate.take(8));
        rate.set(1);
        assert!(!rate.take(8));
    }
}
