//! The link layer: Ethernet and VLAN tags (IEEE 802.1Q, 802.1ad).

use lb_common::vlan::{CUSTOMER, PROVIDER, tag};
use network_types::eth::EthHdr;

use crate::Frame;

/// Tags that a frame may carry.
const TAGS: usize = 2;

/// What the link layer says.
#[derive(Clone, Copy, Debug, Default)]
pub struct Link {
    /// Offset of the IP header.
    pub l3: usize,
    /// Ethernet type of what follows, network order.
    pub kind: u16,
    /// Number of tags within the bytes.
    pub inside: u32,
    /// Is there one outside of the bytes?
    pub outside: bool,
    /// The tags: the outer one in the low half, the inner one in the high half, 0 for none.
    pub vlan: u32,
}

/// Reads it; false when there are more tags than anybody uses.
#[inline(always)]
pub(crate) fn link<F: Frame>(frame: &mut F, link: &mut Link) -> bool {
    link.outside = frame.tagged();
    link.vlan = u32::from(frame.tag());
    link.l3 = EthHdr::LEN;
    let Ok(()) = frame.reach(EthHdr::LEN) else {
        return false;
    };
    let Ok(mut kind) = frame.load::<u16>(EthHdr::LEN - 2) else {
        return false;
    };
    for _ in 0..TAGS {
        if kind != CUSTOMER && kind != PROVIDER {
            break;
        }
        let Ok(()) = frame.reach(link.l3 + 4) else {
            return false;
        };
        let Ok([control, next]) = frame.load::<[u16; 2]>(link.l3) else {
            return false;
        };
        if link.vlan > 0xffff {
            return false;
        }
        let tag = u32::from(tag(kind, u16::from_be(control)));
        link.vlan |= if link.vlan == 0 { tag } else { tag << 16 };
        link.l3 += 4;
        link.inside += 1;
        kind = next;
    }
    link.kind = kind;
    true
}
