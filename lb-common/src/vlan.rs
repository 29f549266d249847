//! VLAN tags (IEEE 802.1Q, 802.1ad) as records hold them: 16 bits each, the outer one in the low half of a word.

/// Ethernet type of a tag, and of a provider's tag around it; network order.
pub const CUSTOMER: u16 = 0x8100_u16.to_be();
/// See [`CUSTOMER`].
pub const PROVIDER: u16 = 0x88a8_u16.to_be();
/// The bit of a tag that says that a frame may be dropped; nobody looks at it, so here it says "of the provider".
const KIND: u16 = 1 << 12;

/// A tag as records hold it, from its kind (network order) and control information (host order).
#[inline(always)]
pub const fn tag(kind: u16, control: u16) -> u16 {
    (control & !KIND) | if kind == PROVIDER { KIND } else { 0 }
}

/// Kind (network order) and control information (host order) of a tag in a record.
#[inline(always)]
pub const fn untag(tag: u16) -> (u16, u16) {
    let kind = if tag & KIND != 0 { PROVIDER } else { CUSTOMER };
    (kind, tag & !KIND)
}

/// The number of the outer VLAN of a record's tags; 0 for none.
#[inline(always)]
pub const fn outer(vlan: u32) -> u32 {
    vlan & 0xfff
}
