//! The member's end.

use std::{net::SocketAddr, sync::atomic::Ordering::Relaxed, time::Duration};

use tokio::{net::TcpStream, time::timeout};

use super::events::Events;
use crate::pool::{Lease, LivePool};

/// A connection to a member, and the place at it. Dropped, it is reset: whatever a member has seen
/// of a message then, it cannot take its end for the end of data.
#[derive(Debug)]
pub(super) struct Upstream {
    pub(super) tcp: TcpStream,
    pub(super) lease: Lease,
    orderly: bool,
}

impl Upstream {
    /// Connects the best member that was not tried yet, and else the next.
    pub(super) async fn connect(
        pool: &LivePool,
        tried: &mut Vec<u16>,
        limit: Duration,
        events: &Events,
    ) -> Option<Self> {
        while let Some(lease) = pool.select(tried) {
            tried.push(lease.member().id);
            match open(lease.member().address, limit).await {
                Some(tcp) => {
                    return Some(Self {
                        tcp,
                        lease,
                        orderly: false,
                    });
                }
                None => events.member_connect_failed.fetch_add(1, Relaxed),
            };
        }
        None
    }

    /// Closes in order.
    pub(super) fn close(mut self) {
        self.orderly = true;
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        if !self.orderly {
            // A stream that is gone already needs no reset.
            let _ = self.tcp.set_zero_linger();
        }
    }
}

async fn open(address: SocketAddr, limit: Duration) -> Option<TcpStream> {
    let tcp = timeout(limit, TcpStream::connect(address))
        .await
        .ok()?
        .ok()?;
    tcp.set_nodelay(true).ok()?;
    Some(tcp)
}
