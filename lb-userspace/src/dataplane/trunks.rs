//! Interfaces of VLANs above those that have a packet program: what comes in by one was met as a tagged frame below.

use std::collections::BTreeSet;

use anyhow::Result;
use futures_util::TryStreamExt as _;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use rtnetlink::Handle;

/// An interface of a VLAN: its index, and that of the interface below.
pub(super) type Tagged = (u32, u32);

/// Every interface of a VLAN whose frames come in by another one of this namespace.
///
/// # Errors
///
/// The kernel refuses.
pub(super) async fn list(handle: &Handle) -> Result<Vec<Tagged>> {
    let links: Vec<LinkMessage> = handle.link().get().execute().try_collect().await?;
    Ok(links.iter().filter_map(tagged).collect())
}

fn tagged(link: &LinkMessage) -> Option<Tagged> {
    let attributes = || link.attributes.iter();
    let is_vlan = attributes().any(|attribute| {
        matches!(attribute, LinkAttribute::LinkInfo(infos)
            if infos.contains(&LinkInfo::Kind(InfoKind::Vlan)))
    });
    // An index of another namespace says nothing here.
    let elsewhere = attributes().any(|one| matches!(one, LinkAttribute::LinkNetNsId(_)));
    let below = attributes().find_map(|attribute| match attribute {
        LinkAttribute::Link(index) => Some(*index),
        _ => None,
    });
    below
        .filter(|_| is_vlan && !elsewhere)
        .map(|below| (link.header.index, below))
}

/// The interfaces above these, a tag within a tag included.
pub(super) fn above(attached: &[u32], tagged: &[Tagged]) -> BTreeSet<u32> {
    let mut found = BTreeSet::new();
    // A round for each tag that a frame may carry.
    for _ in 0..2 {
        for (index, below) in tagged {
            if attached.contains(below) || found.contains(below) {
                found.insert(*index);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, kind: InfoKind, attributes: &[LinkAttribute]) -> LinkMessage {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.attributes = vec![LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)])];
        link.attributes.extend_from_slice(attributes);
        link
    }

    #[test]
    fn interfaces_of_vlans_are_told_from_others() {
        let below = LinkAttribute::Link(2);
        let own = link(5, InfoKind::Vlan, std::slice::from_ref(&below));
        assert_eq!(tagged(&own), Some((5, 2)));
        let foreign = [below.clone(), LinkAttribute::LinkNetNsId(0)];
        assert_eq!(tagged(&link(5, InfoKind::Vlan, &foreign)), None);
        assert_eq!(tagged(&link(5, InfoKind::MacVlan, &[below])), None);
    }

    #[test]
    fn what_is_above_a_packet_program_has_been_met() {
        // 10 and 11 on 2, 20 within 10, 30 on 3, which has no program.
        let tagged = [(20, 10), (10, 2), (11, 2), (30, 3)];
        assert_eq!(above(&[2], &tagged), [10, 11, 20].into());
        assert_eq!(above(&[], &tagged), [].into());
    }
}
