//! How long each wait may last.

/// The limits of one session.
pub use crate::model::session::SessionTimeouts as Timeouts;

/// How much content must arrive within [`Timeouts::data_block`], in octets: a byte now and then is no progress.
pub const DATA_BLOCK: usize = 1024;
