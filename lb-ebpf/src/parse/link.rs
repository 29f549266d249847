//! The link layer: Ethernet and VLAN tags (IEEE 802.1Q, 802.1ad).

use network_types::eth::EthHdr;

use crate::Frame;

/// An 802.1Q tag, and the tag of a provider around it (IEEE 802.1ad), network order.
const CUSTOMER: u16 = 0x8100_u16.to_be();
const PROVIDER: u16 = 0x88a8_u16.to_be();
/// Tags that a frame may carry.
const TAGS: usize = 2;
/// The bit of a tag that says that a frame may be dropped; nobody looks at it, so here it says "of the provider".
const KIND: u16 = 1 << 12;

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

/// A tag as records hold it, from its kind (network order) and control information (host order).
#[inline(always)]
pub(crate) const fn tag(kind: u16, control: u16) -> u16 {
    (control & !KIND) | if kind == PROVIDER { KIND } else { 0 }
}

/// Kind (network order) and control information (host order) of a tag in a record.
#[inline(always)]
pub(crate) const fn untag(tag: u16) -> (u16, u16) {
    let kind = if tag & KIND != 0 { PROVIDER } else { CUSTOMER };
    (kind, tag & !KIND)
}

/// The number of the outer VLAN of a record's tags; 0 for none.
#[inline(always)]
pub(crate) const fn outer(vlan: u32) -> u32 {
    vlan & 0xfff
}
