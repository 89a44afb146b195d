package resolve

import (
	"strings"

	networking "istio.io/api/networking/v1alpha3"

	"isthmus.dev/internal/ir"
)

// prefixPlaceholder in a redirect's URI keeps what follows the matched prefix.
const prefixPlaceholder = "%PREFIX()%"

func redirect(in *networking.HTTPRedirect) *ir.Redirect {
	out := &ir.Redirect{Host: in.GetAuthority(), Scheme: in.GetScheme(), Code: in.GetRedirectCode()}
	if out.Code == 0 {
		out.Code = 301
	}
	switch {
	case in.GetPrefixRewrite() != "":
		out.PrefixRewrite = in.GetPrefixRewrite()
	case strings.HasPrefix(in.GetUri(), prefixPlaceholder):
		out.PrefixRewrite = strings.TrimPrefix(in.GetUri(), prefixPlaceholder)
	default:
		out.Path = in.GetUri()
	}
	switch p := in.GetRedirectPort().(type) {
	case *networking.HTTPRedirect_Port:
		out.Port = p.Port
	case *networking.HTTPRedirect_DerivePort:
		if p.DerivePort == networking.HTTPRedirect_FROM_PROTOCOL_DEFAULT {
			out.Port = 80
			if in.GetScheme() == "https" {
				out.Port = 443
			}
		}
	}
	return out
}

func directResponse(in *networking.HTTPDirectResponse) *ir.DirectResponse {
	out := &ir.DirectResponse{Code: in.GetStatus()}
	switch b := in.GetBody().GetSpecifier().(type) {
	case *networking.HTTPBody_String_:
		out.Body = []byte(b.String_)
	case *networking.HTTPBody_Bytes:
		out.Body = b.Bytes
	}
	return out
}
