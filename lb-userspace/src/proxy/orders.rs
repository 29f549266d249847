//! What all sessions shall do, or those of one member.

use std::{collections::HashMap, sync::Arc};

/// What a session shall do; only ever goes down this list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Control {
    /// Go on.
    Run,
    /// Go on; nobody new comes.
    StopAccepting,
    /// End between messages, with 421 4.3.2.
    Drain,
    /// End now.
    Cut,
}

/// The orders that hold now. A session that begins, or chooses another member, has nothing to do with older ones to a
/// member.
#[derive(Debug, Clone)]
pub struct Orders {
    /// To all.
    pub(super) all: Control,
    /// How many orders to members there have been.
    number: u64,
    /// The last one to the sessions of each member: its number, and what it says.
    members: Arc<HashMap<u16, (u64, Control)>>,
}

impl Orders {
    /// Everybody goes on.
    pub(super) fn none() -> Self {
        Self {
            all: Control::Run,
            number: 0,
            members: Arc::default(),
        }
    }

    /// Gives an order to all; true when it goes further than the one before.
    pub(super) fn raise(&mut self, control: Control) -> bool {
        let raised = self.all < control;
        self.all = self.all.max(control);
        raised
    }

    /// Gives an order to the sessions that a member has now.
    pub(super) fn give(&mut self, member: u16, control: Control) {
        self.number += 1;
        Arc::make_mut(&mut self.members).insert(member, (self.number, control));
    }

    /// What a session of `member` shall do that has heeded all orders up to number `heeded`, which moves on. One that
    /// is on its way to a member heeds those to all, and the others when it knows whom it has got.
    pub(super) fn heed(&self, member: Option<u16>, heeded: &mut u64) -> Control {
        let Some(member) = member else {
            return self.all;
        };
        let since = std::mem::replace(heeded, self.number);
        let own = self
            .members
            .get(&member)
            .filter(|(number, _)| *number > since)
            .map_or(Control::Run, |(_, control)| *control);
        self.all.max(own)
    }

    /// The number of the last order.
    pub(super) fn number(&self) -> u64 {
        self.number
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_reaches_those_whom_it_is_for_once() {
        let mut orders = Orders::none();
        let (mut early, mut other) = (orders.number(), orders.number());
        orders.give(7, Control::Drain);
        let mut late = orders.number();
        assert_eq!(orders.heed(Some(7), &mut early), Control::Drain);
        assert_eq!(orders.heed(Some(7), &mut early), Control::Run);
        assert_eq!(orders.heed(Some(8), &mut other), Control::Run);
        assert_eq!(orders.heed(Some(7), &mut late), Control::Run, "came later");
        assert_eq!(orders.heed(None, &mut late), Control::Run);
        assert!(orders.raise(Control::Cut) && !orders.raise(Control::Drain));
        assert_eq!(orders.heed(None, &mut late), Control::Cut);
    }

    #[test]
    fn an_order_is_heeded_by_who_was_on_the_way_to_that_member() {
        let mut orders = Orders::none();
        let mut heeded = orders.number();
        orders.give(7, Control::Drain);
        assert_eq!(orders.heed(None, &mut heeded), Control::Run);
        assert_eq!(orders.heed(Some(7), &mut heeded), Control::Drain);
    }

    #[test]
    fn orders_in_quick_succession_are_not_lost() {
        let mut orders = Orders::none();
        let mut heeded = orders.number();
        orders.give(7, Control::Cut);
        orders.give(8, Control::Drain);
        assert_eq!(orders.heed(Some(7), &mut heeded), Control::Cut);
    }
}
