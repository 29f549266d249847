//! One address shape for both families: IPv4 is carried as an IPv4-mapped IPv6 address (RFC 4291 §2.5.5.2).

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// An IPv4 or IPv6 address in four words, network order.
///
/// Words rather than bytes: the BPF target copies and compares them in four instructions.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Addr(pub [u32; 4]);

/// The third word of an IPv4-mapped address, network order.
pub const MAPPED: u32 = 0x0000_ffff_u32.to_be();

impl Addr {
    /// The unset address, `::`.
    pub const UNSET: Self = Self([0; 4]);

    /// Becomes another, word by word: an assignment between records would call the BPF target's own `memmove`, which goes
    /// byte by byte.
    #[inline(always)]
    pub fn copy(&mut self, from: &Self) {
        let [a, b, c, d] = from.0;
        self.0[0] = a;
        self.0[1] = b;
        self.0[2] = c;
        self.0[3] = d;
    }

    /// From the word of an IPv4 header, network order.
    #[inline(always)]
    pub const fn v4(word: u32) -> Self {
        Self([0, 0, MAPPED, word])
    }

    /// Is it an IPv4 address?
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == MAPPED
    }

    /// The address in the shape of the standard library.
    pub fn to_ip(self) -> IpAddr {
        let mut bytes = [0; 16];
        for (to, word) in bytes.chunks_exact_mut(4).zip(self.0) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        let address = Ipv6Addr::from(bytes);
        address
            .to_ipv4_mapped()
            .map_or(IpAddr::V6(address), IpAddr::V4)
    }

    /// Address and port (network order) in the shape of the standard library.
    pub fn to_socket_addr(self, port: u16) -> SocketAddr {
        SocketAddr::new(self.to_ip(), u16::from_be(port))
    }
}

impl From<IpAddr> for Addr {
    fn from(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => address.into(),
            IpAddr::V6(address) => address.into(),
        }
    }
}

impl From<Ipv4Addr> for Addr {
    fn from(address: Ipv4Addr) -> Self {
        Self::v4(u32::from_ne_bytes(address.octets()))
    }
}

impl From<Ipv6Addr> for Addr {
    fn from(address: Ipv6Addr) -> Self {
        let mut words = [0; 4];
        for (word, bytes) in words.iter_mut().zip(address.octets().chunks_exact(4)) {
            *word = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        Self(words)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survives_the_round_trip() {
        for text in ["203.0.113.10", "0.0.0.0", "2001:db8::25", "::1", "::"] {
            let address: IpAddr = text.parse().unwrap();
            assert_eq!(Addr::from(address).to_ip(), address);
            assert_eq!(Addr::from(address).is_v4(), address.is_ipv4());
        }
        assert_eq!(
            Addr::UNSET.to_socket_addr(465u16.to_be()),
            "[::]:465".parse().unwrap()
        );
    }
}
