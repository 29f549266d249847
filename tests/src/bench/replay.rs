//! A packet of a test-run that becomes another packet each time, in front of the packet programs.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Context, Result, ensure};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, MapData, ProgramArray},
    programs::{ProgramFd, SchedClassifier, TestRun as _, TestRunOptions, Xdp},
};

/// The programs of `tests/bpf`.
pub(crate) static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("SMTPLB_TESTS_OBJECT"));

/// Where a packet program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// Ingress of an interface, behind the driver.
    Tc,
    /// In the driver.
    Xdp,
    /// XDP behind the driver.
    XdpGeneric,
}

impl Hook {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Tc, Self::Xdp, Self::XdpGeneric];

    /// As the programs' names end.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tc => "tc",
            Self::Xdp => "xdp",
            Self::XdpGeneric => "xdp_generic",
        }
    }

    /// What the program returns for a packet that goes on by an interface.
    pub fn sent(self) -> u32 {
        match self {
            Self::Tc => 7,
            Self::Xdp | Self::XdpGeneric => 4,
        }
    }

    /// What it returns for a packet that goes back by the interface it came by.
    pub fn returned(self) -> u32 {
        match self {
            Self::Tc => 7,
            Self::Xdp | Self::XdpGeneric => 3,
        }
    }

    /// What it returns for a packet that it leaves to the stack.
    pub fn passed(self) -> u32 {
        match self {
            Self::Tc => u32::MAX,
            Self::Xdp | Self::XdpGeneric => 2,
        }
    }
}

/// Whose packet, and of what kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ends {
    /// Source.
    pub src: SocketAddrV4,
    /// Destination.
    pub dst: SocketAddrV4,
    /// TCP flags.
    pub flags: u8,
}

impl Ends {
    /// As the programs have it, in the byte order of the wire.
    fn record(self) -> [u32; 4] {
        let address = |address: &Ipv4Addr| u32::from_ne_bytes(address.octets());
        let [a, b] = self.src.port().to_be_bytes();
        let [c, d] = self.dst.port().to_be_bytes();
        [
            address(self.src.ip()),
            address(self.dst.ip()),
            u32::from_ne_bytes([a, b, c, d]),
            u32::from(self.flags),
        ]
    }
}

/// What a run came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// What the program returned for the last packet.
    pub verdict: u32,
    /// Per packet.
    pub nanoseconds: u32,
}

/// The programs, and the list that they walk.
pub struct Replay {
    ebpf: Ebpf,
    list: Array<MapData, [u32; 4]>,
    place: Array<MapData, [u32; 4]>,
    next: [ProgramArray<MapData>; 3],
    length: u32,
}

impl Replay {
    /// Loads the programs for lists of at most `length` packets, a power of two.
    ///
    /// # Errors
    /// When the kernel refuses them.
    pub fn load(length: u32) -> Result<Self> {
        ensure!(length.is_power_of_two(), "{length} is no power of two");
        let mut ebpf = EbpfLoader::new()
            .map_max_entries("LIST", length)
            .load(OBJECT)
            .context("cannot load the replay programs")?;
        for hook in Hook::ALL {
            for kind in ["replay", "nothing"] {
                load(&mut ebpf, &format!("{kind}_{}", hook.name()), hook)?;
            }
        }
        let mut map = |name: &str| {
            ebpf.take_map(name)
                .with_context(|| format!("no map {name}"))
        };
        let next = [map("NEXT_TC")?, map("NEXT_XDP")?, map("NEXT_XDP_GENERIC")?];
        let [tc, xdp, generic] = next;
        Ok(Self {
            list: map("LIST")?.try_into()?,
            place: map("PLACE")?.try_into()?,
            next: [tc.try_into()?, xdp.try_into()?, generic.try_into()?],
            ebpf,
            length,
        })
    }

    /// Puts packets into the list. Only a list as long as a power of two can be walked more than once.
    ///
    /// # Errors
    /// When there are too many.
    pub fn fill(&mut self, packets: impl ExactSizeIterator<Item = Ends>) -> Result<()> {
        let count = u32::try_from(packets.len())?;
        ensure!(
            (1..=self.length).contains(&count),
            "{count} packets in a list of {}",
            self.length
        );
        for (place, packet) in (0..).zip(packets) {
            self.list.set(place, packet.record(), 0)?;
        }
        let check = u32::from(u16::from_ne_bytes([packet()[24], packet()[25]]));
        let mask = count.next_power_of_two() - 1;
        self.place.set(0, [u32::MAX, mask, 0, check], 0)?;
        Ok(())
    }

    /// Runs `count` packets of the list through a program, or through one that does nothing.
    ///
    /// # Errors
    /// When the kernel refuses to.
    pub fn run(
        &mut self,
        hook: Hook,
        program: Option<&ProgramFd>,
        count: u32,
        ingress: u32,
    ) -> Result<Run> {
        let nothing = format!("nothing_{}", hook.name());
        let program = match program {
            Some(program) => program.try_clone()?,
            None => match hook {
                Hook::Tc => self.classifier(&nothing)?.fd()?.try_clone()?,
                Hook::Xdp | Hook::XdpGeneric => self.xdp(&nothing)?.fd()?.try_clone()?,
            },
        };
        self.next[hook as usize]
            .set(0, &program, 0)
            .context("the kernel does not let the replay call the program")?;
        let packet = packet();
        let mut context = [0; 192];
        let mut options = TestRunOptions {
            data_in: Some(&packet),
            repeat: count,
            ..TestRunOptions::new()
        };
        let replay = format!("replay_{}", hook.name());
        let result = match hook {
            Hook::Tc => {
                // struct __sk_buff: ingress_ifindex, ifindex.
                context[36..40].copy_from_slice(&ingress.to_ne_bytes());
                context[40..44].copy_from_slice(&ingress.to_ne_bytes());
                options.ctx_in = Some(&context);
                self.classifier(&replay)?.test_run(options)?
            }
            Hook::Xdp | Hook::XdpGeneric => {
                // struct xdp_md: data_end is the length, then the interface.
                context[4..8].copy_from_slice(&(packet.len() as u32).to_ne_bytes());
                context[12..16].copy_from_slice(&ingress.to_ne_bytes());
                options.ctx_in = Some(&context[..24]);
                self.xdp(&replay)?.test_run(options)?
            }
        };
        Ok(Run {
            verdict: result.return_value,
            nanoseconds: u32::try_from(result.duration.as_nanos())?,
        })
    }

    fn classifier(&mut self, name: &str) -> Result<&mut SchedClassifier> {
        let program = self.ebpf.program_mut(name).context("no such program")?;
        Ok(program.try_into()?)
    }

    fn xdp(&mut self, name: &str) -> Result<&mut Xdp> {
        let program = self.ebpf.program_mut(name).context("no such program")?;
        Ok(program.try_into()?)
    }
}

fn load(ebpf: &mut Ebpf, name: &str, hook: Hook) -> Result<()> {
    let program = ebpf
        .program_mut(name)
        .with_context(|| format!("the object has no program {name}"))?;
    let loaded = match hook {
        Hook::Tc => <&mut SchedClassifier>::try_from(program)?.load(),
        Hook::Xdp | Hook::XdpGeneric => <&mut Xdp>::try_from(program)?.load(),
    };
    loaded.with_context(|| format!("the kernel refuses {name}"))
}

/// A TCP packet of 64 bytes: Ethernet, IPv4, TCP, ten bytes of payload.
fn packet() -> [u8; 64] {
    let mut packet = [0; 64];
    packet[..14].copy_from_slice(&[2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x08, 0]);
    packet[14..24].copy_from_slice(&[0x45, 0, 0, 50, 0x12, 0x34, 0x40, 0, 64, 6]);
    packet[46..50].copy_from_slice(&[0x50, 0x10, 0x20, 0]);
    packet[50] = 0x5a;
    packet[24] = 0x5a;
    packet
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_as_on_the_wire() {
        let ends = Ends {
            src: "1.2.3.4:258".parse().unwrap(),
            dst: "5.6.7.8:772".parse().unwrap(),
            flags: 2,
        };
        let bytes: Vec<u8> = ends
            .record()
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .collect();
        assert_eq!(bytes[..12], [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4]);
    }
}
