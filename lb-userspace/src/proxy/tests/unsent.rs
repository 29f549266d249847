//! What TLS takes and its socket does not is bounded, on both sides.

use std::{future::poll_fn, pin::Pin, sync::Arc, task::Poll};

use tokio::{io::AsyncWrite, net::TcpListener, runtime::Builder, task::unconstrained};

use super::{
    super::{client::ClientStream, upstream::Link},
    members::IMPLICIT,
    peers::PATIENCE,
};
use crate::{
    model::ProxyHeader,
    proxy::MemberSecurity,
    tls::tests::{Pair, plain},
};

/// Writes until nothing is taken any more; how many bytes were.
async fn fill(stream: &mut (impl AsyncWrite + Unpin)) -> usize {
    let bytes = vec![b'x'; 64 * 1024];
    let mut taken = 0;
    let filling = poll_fn(|cx| {
        while let Poll::Ready(count) = Pin::new(&mut *stream).poll_write(cx, &bytes) {
            taken += count.unwrap();
        }
        Poll::Ready(())
    });
    // Else the runtime ends it, not the socket.
    unconstrained(filling).await;
    taken
}

#[test]
fn peers_that_do_not_read_get_little_ahead() {
    // The box meets itself: as a client's server, and as a member's client.
    let pair = Pair::new(&["127.0.0.1"]);
    let for_clients = plain(&[Arc::new(pair.load().unwrap())]).unwrap();
    let MemberSecurity::Implicit(for_members) = IMPLICIT(&pair) else {
        panic!("implicit TLS");
    };
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let link = Link::open_own(address, ProxyHeader::None, PATIENCE).await;
        let mut link = link.unwrap();
        let mut client = ClientStream::Plain(listener.accept().await.unwrap().0);
        let secured = tokio::join!(
            link.secure(&for_members, PATIENCE),
            client.secure(&for_clients, PATIENCE)
        );
        assert!(secured.0.is_ok() && secured.1.is_ok());
        assert!(fill(&mut link).await > 64 * 1024);
        assert!(fill(&mut client).await > 64 * 1024);
        let (to_member, to_client) = (link.unsent(), client.unsent());
        assert!(to_member > 0 && to_member < 33 * 1024, "{to_member} bytes");
        assert!(to_client > 0 && to_client < 9 * 1024, "{to_client} bytes");
    });
}
