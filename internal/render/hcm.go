package render

import (
	"strconv"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	corsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/cors/v3"
	faultv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/fault/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"isthmus.dev/internal/ir"
)

const (
	hcmName    = "envoy.filters.network.http_connection_manager"
	routerName = "envoy.filters.http.router"
	faultName  = "envoy.filters.http.fault"
	corsName   = "envoy.filters.http.cors"
)

// outboundHTTP serves the route table of a listener.
func outboundHTTP(l *ir.Listener) *listenerv3.Filter {
	out := connectionManager("outbound_" + outboundStat(l) + ";")
	out.RouteSpecifier = &hcmv3.HttpConnectionManager_Rds{Rds: &hcmv3.Rds{
		ConfigSource:    ads(),
		RouteConfigName: l.RouteTable,
	}}
	out.AccessLog = outboundHTTPMetrics()
	if l.OnDemand != nil {
		out.HttpFilters = append(out.HttpFilters, onDemandFilter())
	}
	if l.Sniff {
		out.HttpFilters = append(out.HttpFilters, alpnFilter())
	}
	out.HttpFilters = append(out.HttpFilters,
		// A route's configuration of them switches them on.
		disabled(httpFilter(faultName, &faultv3.HTTPFault{})),
		disabled(httpFilter(corsName, &corsv3.Cors{})),
		router(),
	)
	return networkFilter(hcmName, out)
}

// outboundStat is the listener's address and port as Istio writes them.
func outboundStat(l *ir.Listener) string {
	address := "0.0.0.0"
	if l.Address.IsValid() {
		address = l.Address.Unmap().WithZone("").String()
	}
	return address + "_" + strconv.FormatUint(uint64(l.Port), 10)
}

// connectionManager has what all of them share, Istio's defaults: paths are
// normalized (authorization depends on it) but slashes not merged, WebSocket is
// let through, streams may idle for ever, and headers that the application set
// are its own.
func connectionManager(stat string) *hcmv3.HttpConnectionManager {
	return &hcmv3.HttpConnectionManager{
		CodecType:                    hcmv3.HttpConnectionManager_AUTO,
		StatPrefix:                   stat,
		NormalizePath:                yes(),
		PathWithEscapedSlashesAction: hcmv3.HttpConnectionManager_KEEP_UNCHANGED,
		UseRemoteAddress:             no(),
		GenerateRequestId:            yes(),
		StreamIdleTimeout:            durationpb.New(0),
		ServerHeaderTransformation:   hcmv3.HttpConnectionManager_PASS_THROUGH,
		UpgradeConfigs:               []*hcmv3.HttpConnectionManager_UpgradeConfig{{UpgradeType: "websocket"}},
	}
}

func router() *hcmv3.HttpFilter { return httpFilter(routerName, &routerv3.Router{}) }

func httpFilter(name string, config proto.Message) *hcmv3.HttpFilter {
	return &hcmv3.HttpFilter{Name: name, ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: anyOf(config)}}
}

// disabled is a filter that costs nothing until a route configures it.
func disabled(f *hcmv3.HttpFilter) *hcmv3.HttpFilter {
	f.Disabled = true
	return f
}

// inlineRoute is a route configuration with one route, for everything.
func inlineRoute(name, virtualHost, cluster string) *routev3.RouteConfiguration {
	return &routev3.RouteConfiguration{
		Name:             name,
		ValidateClusters: no(),
		VirtualHosts: []*routev3.VirtualHost{{
			Name:    virtualHost,
			Domains: []string{"*"},
			Routes: []*routev3.Route{{
				Name:  "default",
				Match: &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}},
				Action: &routev3.Route_Route{Route: &routev3.RouteAction{
					ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: cluster},
					Timeout:          durationpb.New(0),
				}},
			}},
		}},
	}
}
