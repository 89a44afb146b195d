package controlplane

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/resolver"

	"isthmus.dev/internal/agent/config"
	"isthmus.dev/internal/agent/identity"
)

// Credentials of a workload for a connection of somebody else's making (the xDS
// stream's). They follow the identity as it is renewed.
func Credentials(server config.Server, src *identity.Source) grpc.DialOption {
	roots, certificate := current(src)
	return grpc.WithTransportCredentials(credentials.NewTLS(tlsConfig(server, roots, certificate)))
}

func current(src *identity.Source) (func() *x509.CertPool, func() *tls.Certificate) {
	return func() *x509.CertPool { id, _ := src.Current(); return id.Pool() },
		func() *tls.Certificate { id, _ := src.Current(); return id.Certificate() }
}

// Targets of gRPC, one for each address of the control plane.
func Targets(server config.Server) []string {
	var targets []string
	for _, a := range server.Addresses() {
		targets = append(targets, "dns:///"+a)
	}
	return targets
}

// anyAddress begins with any of the addresses that there are, so that agents spread
// over replicas.
const anyAddress = `{"loadBalancingConfig": [{"pick_first": {"shuffleAddressList": true}}]}`

// dialAny gives the target of a connection to any address of the control plane.
func dialAny(server config.Server) (target string, opts []grpc.DialOption) {
	opts = []grpc.DialOption{grpc.WithDefaultServiceConfig(anyAddress)}
	targets := Targets(server)
	if len(targets) == 1 {
		return targets[0], opts
	}
	list := addressList(server.Addresses())
	return list.Scheme() + ":///" + server.ServerName(), append(opts, grpc.WithResolvers(list))
}

// addressList resolves to itself.
type addressList []string

func (addressList) Scheme() string { return "list" }

func (l addressList) Build(_ resolver.Target, cc resolver.ClientConn, _ resolver.BuildOptions) (resolver.Resolver, error) {
	var state resolver.State
	for _, a := range l {
		state.Addresses = append(state.Addresses, resolver.Address{Addr: a})
	}
	return l, cc.UpdateState(state)
}

func (addressList) ResolveNow(resolver.ResolveNowOptions) {}

func (addressList) Close() {}

// dialFirst connects to the first address that lets it. One that does not answer
// leaves the others their share of the time.
func dialFirst(ctx context.Context, server config.Server) (c net.Conn, err error) {
	addresses := server.Addresses()
	for i, a := range addresses {
		if c, err = dialShare(ctx, a, len(addresses)-i); err == nil {
			return c, nil
		}
	}
	return nil, err
}

// dialShare connects within the shareth part of the time that is left.
func dialShare(ctx context.Context, address string, share int) (net.Conn, error) {
	if deadline, ok := ctx.Deadline(); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Until(deadline)/time.Duration(share))
		defer cancel()
	}
	return (&net.Dialer{}).DialContext(ctx, "tcp", address)
}
